"""Output for notebooks: HTML of tables and lines, and the kernel that this process is, if it is one."""
