"""The report of `fpn-det check-data`: contents and faults of a data set, on the screen, as JSON and as an HTML page."""
