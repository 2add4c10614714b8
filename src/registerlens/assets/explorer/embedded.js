// The explorers of a page, each beside its data; where there are several, the first script mounts them all.
for (const root of document.querySelectorAll(".rl-explorer[data-waiting]")) {
  delete root.dataset.waiting;
  mount(root, embedded(JSON.parse(document.getElementById(`${root.id}-data`).textContent)));
}
