"""The command `fpn-det eval`, from a checkout."""

from fpn_det.cli.eval import main

if __name__ == "__main__":
    main()
