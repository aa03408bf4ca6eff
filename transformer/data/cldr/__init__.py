"""The embedded data set, generated from the Unicode CLDR."""
