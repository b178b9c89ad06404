"""What every server here shares: an address to listen on, and which requests are let in."""
