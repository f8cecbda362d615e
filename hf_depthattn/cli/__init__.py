"""The command `depthattn`: modules here parse arguments, call the function that does the work and print its report."""
