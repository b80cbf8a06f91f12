"""The command `fpn-det show-data`, from a checkout."""

from fpn_det.cli.main import run

if __name__ == "__main__":
    run("show-data")
