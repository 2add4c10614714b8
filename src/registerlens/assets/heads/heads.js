// Views of attention heads, each beside its data. One of them brings CircuitsVis, compressed; the others wait for it.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function draw(place) {
  const told = (part) => JSON.parse(document.getElementById(`${place.id}-${part}`)?.textContent ?? "null");
  const packed = told("library");
  if (packed) globalThis.registerlensCircuitsVis ??= unpack(packed);
  for (let tries = 0; !globalThis.registerlensCircuitsVis && tries < 100; tries += 1) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  if (globalThis.registerlensCircuitsVis) {
    await globalThis.registerlensCircuitsVis;
    CircuitsVis.render(place.id, CircuitsVis.AttentionHeads, told("data"));
  } else {
    place.textContent = "CircuitsVis is not on this page: show a view with script=True first.";
  }
}

for (const place of document.querySelectorAll(".registerlens-heads[data-waiting]")) {
  delete place.dataset.waiting;
  draw(place);
}
