"""results.json and report.html of a run."""
