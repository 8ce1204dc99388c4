"""The pictures of the documentation, drawn from plans and runs: ``python -m docs.pictures``.

Each SVG holds the data that it shows, as JSON in its description, so that the tests can compare
them with what plans say now.
"""
