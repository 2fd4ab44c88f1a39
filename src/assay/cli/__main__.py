"""`python -m assay.cli`: the command."""

from assay.cli.entry import main

if __name__ == "__main__":
    main()
