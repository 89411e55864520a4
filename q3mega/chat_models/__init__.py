"""Models that answer in text: teachers and judges behind an endpoint or in a folder."""
