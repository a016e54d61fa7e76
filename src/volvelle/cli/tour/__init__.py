"""The tour: a few minutes in which each family does real work, and one report of what happened.

A stage is a function that takes the `Tour`, does its work, and adds to the report. A family joins by a file with its
stage and a row in `stages.STAGES`; no stage takes more than about 40 seconds but the adaptation.
"""
