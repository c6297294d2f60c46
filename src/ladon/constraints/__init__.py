"""What texts may be: JSON schemas, regular expressions and grammars, as states that token trees can ask."""
