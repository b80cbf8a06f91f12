"""The command `fpn-det weights`, from a checkout."""

from fpn_det.cli.main import run

if __name__ == "__main__":
    run("weights")
