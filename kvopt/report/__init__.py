"""Reports of a run: the leaderboard as JSON, CSV and a terminal table."""
