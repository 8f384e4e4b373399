"""The command, as the launcher of a job starts it."""

from probtensor.cli import app

if __name__ == "__main__":
    app()
