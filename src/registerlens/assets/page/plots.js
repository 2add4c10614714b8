// Every figure stands beside its data.
for (const place of document.querySelectorAll(".plotly-graph-div")) {
  const { data, layout } = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, data, layout, { displaylogo: false, responsive: true });
}
