"""What every component stands on: nothing here knows models, federations or releases."""
