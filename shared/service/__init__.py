"""What every process and every command needs: gRPC server, metrics page, settings, logs, and the terminal."""
