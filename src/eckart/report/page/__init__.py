"""Reports as one HTML file: pictures in SVG, no script, nothing from elsewhere. Readable without eckart.

`compression`, `training`, `comparison`, `bench` and `scores` say what stands on a page, as blocks; `render` writes them
by the template; `scatter`, `bars`, `lines` and `heat` draw. Whatever a checkpoint says is escaped.
"""
