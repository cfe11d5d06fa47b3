"use strict";
// The page of explore.py: what its settings share, and what is kept of them when it is loaded again.

const COUNTS = [1, 2, 4, 9, 16, 32]; // of images

const shared = $("#shared");
let info; // what the server says of networks and options
let panes = [];
let chosen = 0; // the image whose path is shown

/** What networks are called: the ends of their addresses, of two parts or as many as it takes to tell them apart. */
function shortNames(addresses) {
  for (let count = 2; ; count++) {
    const ends = addresses.map((address) => address.split("/").slice(-count).join("/"));
    if (new Set(ends).size === ends.length) return ends;
  }
}

function choose(cell) {
  if (!cell) return;
  chosen = [...cell.parentElement.children].indexOf(cell);
  panes.forEach((pane) => pane.mark());
  if (shared.path.checked) panes.forEach((pane) => pane.ask());
}

/** Show the shared fields that some network takes, and mark where two settings differ. */
function arrangeShared() {
  const networks = panes.map((pane) => pane.network);
  show(shared, "class", Boolean(info.classifier) || networks.some((network) => network.classes));
  show(shared, "prompt", networks.some((network) => network.text));
  const { class_names: names, classes } = networks.find((network) => network.classes) ?? { classes: 0 };
  $("#classes").replaceChildren(...Array.from({ length: classes }, (_, k) => new Option(names?.[k] ?? "", k)));
  for (const pane of panes) {
    const other = panes.find((another) => another !== pane)?.values;
    for (const [name, value] of Object.entries(pane.values)) {
      const label = $(`label[for="${name}${pane.letter}"]`, pane.form);
      label?.classList.toggle("differs", other !== undefined && other[name] !== value);
    }
  }
}

function compare(on, values) {
  if (on && panes.length === 1) panes.push(new Pane("B", values));
  if (!on) panes.splice(1);
  $("#panes").replaceChildren(...panes.map((pane) => pane.element));
  $("#panes").classList.toggle("compared", on);
  $("#compare").setAttribute("aria-pressed", String(on));
  panes.forEach((pane) => pane.arrange());
  arrangeShared();
}

/** What this page was begun with: what is saved of another is none of its business. */
const origin = () => JSON.stringify([info.networks.map(({ name }) => name), info.first, info.guide, info.more]);

function save() {
  const { seed, images, prompt, path } = shared;
  const state = { seed: seed.value, images: images.value, class: shared.class.value, prompt: prompt.value };
  const settings = panes.map((pane) => pane.values);
  sessionStorage.explore = JSON.stringify({ origin: origin(), ...state, path: path.checked, settings });
}

function saved() {
  try {
    const state = JSON.parse(sessionStorage.explore);
    return state.origin === origin() ? state : null;
  } catch {
    return null;
  }
}

/** The setting that the command line asks for. */
function firstValues() {
  const first = (name) => info.first[name]?.[0] ?? String(info.defaults[name] ?? "");
  const [lo = "", hi = ""] = first("guidance-interval").split(",");
  const second = info.guide === "network" ? 1 : 0;
  const names = ["sampler", "steps", "guidance", "temperature"];
  const values = Object.fromEntries(names.map((name) => [name, first(name)]));
  return { network: "0", gnetwork: String(second), guide: info.guide, lo, hi, more: info.more, ...values };
}

async function start() {
  try {
    info = await (await fetch("api/networks")).json();
  } catch {
    $("#gone").textContent = GONE;
    $("#gone").hidden = false;
    return;
  }
  shortNames(info.networks.map(({ name }) => name)).forEach((label, i) => (info.networks[i].label = label));
  fill(shared.images, COUNTS.map((count) => [count, count]));
  const state = saved();
  const { resolution, pixels } = info.networks[0];
  shared.images.value = state?.images ?? (resolution <= 32 ? 16 : resolution <= SMALL && pixels ? 4 : 1);
  shared.seed.value = state?.seed ?? "0";
  shared.class.value = state?.class ?? info.first.class?.[0] ?? "";
  shared.prompt.value = state?.prompt ?? (info.first.prompt ?? []).join("\n");
  shared.path.checked = state?.path ?? pixels;
  panes = [new Pane("A", state?.settings[0] ?? firstValues())];
  if (!state) ["", "g"].forEach((prefix) => panes[0].begin(prefix));
  compare(state?.settings.length === 2, state?.settings[1]);
  panes.forEach((pane) => pane.ask());

  shared.addEventListener("submit", (event) => event.preventDefault());
  shared.addEventListener("input", (event) => {
    chosen = Math.min(chosen, Number(shared.images.value) - 1);
    const typed = event.target.matches("textarea, input:not([type=checkbox])");
    panes.forEach((pane) => pane.askSoon(typed ? TYPING : 0));
  });
  for (const button of all("[data-turn]")) {
    button.addEventListener("click", () => {
      const seed = Number(shared.seed.value) + button.dataset.turn * shared.images.value;
      shared.seed.value = Math.max(Number.isNaN(seed) ? 0 : seed, 0);
      panes.forEach((pane) => pane.ask());
    });
  }
  $("#compare").addEventListener("click", () => {
    compare(panes.length === 1, panes[0].values);
    panes.forEach((pane) => pane.ask());
  });
}

start();
