"""The processes as services of launchd (macOS) and of systemd (Linux)."""
