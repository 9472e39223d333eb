"""`python -m glmexport`."""

from glmexport.cli.main import run

if __name__ == "__main__":
    run()
