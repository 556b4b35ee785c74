"""What is sent to the Hub, the process that sends it, and what is fetched from there."""
