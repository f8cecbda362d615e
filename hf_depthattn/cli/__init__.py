"""The command `depthattn`: parse arguments, call the function that does the work, and print its report."""
