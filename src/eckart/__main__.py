"""`python -m eckart`."""

from eckart.cli import main

if __name__ == "__main__":
    main()
