"""What gradwatch costs, and how its verdicts fare on labelled runs."""
