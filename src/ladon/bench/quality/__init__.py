"""Quality of what is decoded: is it the same text, does it repeat itself, where are tokens lost?"""
