"""Tables, plots and the stand-alone page of a run."""
