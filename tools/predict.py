"""The command `fpn-det predict`, from a checkout."""

from fpn_det.cli.main import run

if __name__ == "__main__":
    run("predict")
