"""What every process and every command uses: gRPC server, metrics page, settings, logs, and the terminal."""
