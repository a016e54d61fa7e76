"""Language models wired from parts."""
