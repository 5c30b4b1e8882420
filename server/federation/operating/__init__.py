"""What operators of real machines need: keys, backups, and runs that are started again."""
