// The table of contents is open where it stands beside the text. On paper, figures fit and nothing is folded away.
(() => {
  const contents = document.querySelector("nav details");
  const beside = matchMedia("(min-width: 1100px)");
  const fold = () => { if (contents) contents.open = beside.matches; };
  beside.addEventListener("change", fold);
  fold();

  let folded = [];
  const plots = () => document.querySelectorAll(".js-plotly-plot");
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("main details:not([open])")];
    folded.forEach((one) => { one.open = true; });
    plots().forEach((plot) => Plotly.relayout(plot, { width: 680 }));
  });
  addEventListener("afterprint", () => {
    folded.forEach((one) => { one.open = false; });
    plots().forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true }));
  });
})();
