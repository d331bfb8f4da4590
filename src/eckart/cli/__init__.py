"""One command of the command line a file: parse, call, print."""
