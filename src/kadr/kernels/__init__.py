"""Operations worth writing twice: plainly, and fast."""
