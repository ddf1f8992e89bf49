"""The web page of the server: runs, their metrics, and a chat with the trained model."""
