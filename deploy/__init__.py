"""Files that deploy kadr, and a rehearsal of its image where there is no Docker."""
