"""From what the signed metadata list to the files of a release: trust, network, downloads."""
