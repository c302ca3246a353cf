"""From finished cells to tables: the store, statistics, leaderboards; no torch."""
