"""How fast kadr is on this machine: cases, contenders that run in turns, and what is noted of them."""
