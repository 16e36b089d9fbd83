"""Who may reach a service, and how a client is let in: certificates, tokens, and where a service listens."""
