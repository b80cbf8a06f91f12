"""The command `fpn-det train`, from a checkout."""

from fpn_det.cli.train import main

if __name__ == "__main__":
    main()
