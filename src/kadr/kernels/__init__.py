"""Operations with a reference implementation in plain torch and a faster one."""
