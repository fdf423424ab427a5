"""From a job to its profile, to verdicts on cards, to the largest job and to advice."""
