"""Programs that try to break things: kills, full disks, bad data, hostile adapters, long runs."""
