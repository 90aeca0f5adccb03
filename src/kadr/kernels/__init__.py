"""Operations with a definition in plain torch and a faster implementation beside it."""
