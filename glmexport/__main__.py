"""`python -m glmexport`."""

from glmexport.cli.main import main

if __name__ == "__main__":
    main()
