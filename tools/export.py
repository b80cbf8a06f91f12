"""The command `fpn-det export`, from a checkout."""

from fpn_det.cli.main import run

if __name__ == "__main__":
    run("export")
