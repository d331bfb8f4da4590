"""`python -m eckart`."""

from eckart.cli.start import main

if __name__ == "__main__":
    main()
