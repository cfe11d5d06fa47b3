"use strict";
// One of the settings of the page: a form, the images that the server makes of it, and their commands.

const SMALL = 64; // pixels; smaller images are enlarged as they are, with square pixels
const COLUMNS = { 1: 1, 2: 2, 4: 2, 9: 3, 16: 4, 32: 8 };
const PATIENCE = 1000; // ms that a request may take before a newer one ends it; else that one waits
const TYPING = 300; // ms after the last key
const BUSY = 150; // ms after which the page says that it is working
const AS_SAVED = { "": "none", ema: "as trained (ema)" }; // by the ends of the names of snapshots
const GONE = "The server does not answer: start explore.py again, and reload this page.";

const $ = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const tab = crypto.randomUUID();

function fill(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => String(value) === before)) select.value = before;
}

function show(inside, row, visible) {
  const element = $(`[data-row="${row}"]`, inside);
  element.hidden = !visible;
  for (const field of all("input, select, textarea", element)) field.disabled = !visible;
}

/** Whether a network can guide another: it makes the same kind of images, and knows the same conditions or none. */
function fits(guide, main) {
  const same = guide.classes === main.classes && guide.text === main.text;
  return guide.denoiser && guide.resolution === main.resolution && (same || !(guide.classes || guide.text));
}

const number = (x) => (x >= 100 ? x.toFixed(0) : String(Number(x.toPrecision(2))));

function bold(text) {
  const element = document.createElement("b");
  element.textContent = text;
  return element;
}

function picture(png, alt) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  image.alt = alt;
  return image;
}

class Pane {
  constructor(letter, values) {
    this.letter = letter;
    this.element = $("#pane").content.cloneNode(true).firstElementChild;
    this.element.setAttribute("aria-label", `Setting ${letter}`);
    for (const label of all("label[for]", this.element)) label.htmlFor += letter;
    for (const field of all("[id]", this.element)) field.id += letter;
    this.view = $(".view", this.element);
    this.form = $(".controls", this.element);
    this.timer = null; // until the next request
    this.running = null; // {controller, since} of the request that is under way
    this.waiting = false; // whether another one is to follow it
    fill(this.form.network, info.networks.map(({ label }, i) => [i, label]));
    fill(this.form.sampler, Object.keys(info.takes_steps).map((name) => [name, name]));
    this.form.addEventListener("input", (event) => this.changed(event.target));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    $(".copy", this.element).addEventListener("click", (event) => this.copy(event.target));
    $(".cells", this.view).addEventListener("click", (event) => choose(event.target.closest(".cell")));
    $(".cells", this.view).addEventListener("keydown", (event) => this.walk(event));
    this.values = values;
  }

  /** What is chosen, by the names of the fields: text. */
  get values() {
    return Object.fromEntries(all("[name]", this.form).map((field) => [field.name, field.value]));
  }

  set values(values) {
    // The lists of a network's times and averages must be there before one is chosen.
    this.form.network.value = values.network;
    this.listGuides();
    this.form.gnetwork.value = values.gnetwork;
    for (const prefix of ["", "g"]) this.listAverages(prefix);
    for (const [name, value] of Object.entries(values)) if (this.form[name]) this.form[name].value = value;
    this.arrange();
  }

  get network() {
    return info.networks[this.form.network.value];
  }

  /** Offer the networks that can guide the chosen one. */
  listGuides() {
    const guides = [...info.networks.entries()].filter(([, network]) => fits(network, this.network));
    fill(this.form.gnetwork, guides.map(([i, { label }]) => [i, label]));
  }

  /** Offer the times and averages of the network that is chosen in the field `prefix` + network. */
  listAverages(prefix) {
    const network = info.networks[this.form[`${prefix}network`].value];
    if (!network) return;
    fill(this.form[`${prefix}kimg`], network.times.map((kimg) => [kimg, `${(1000 * kimg).toLocaleString("en")} images`]));
    const lengths = network.tracked.length ? [["length", "any EMA length"]] : [];
    const others = network.other_averages.map((end) => [end, AS_SAVED[end] ?? `as saved: ${end}`]);
    fill(this.form[`${prefix}average`], [...lengths, ...others]);
  }

  /** Choose what a network's address stands for; of a guide that is the same network, the first snapshot. */
  begin(prefix) {
    if (!info.networks[this.form[`${prefix}network`].value]) return;
    const { start, tracked } = info.networks[this.form[`${prefix}network`].value];
    const isLength = tracked.some((std) => std.toFixed(3) === start.ema);
    const earlier = prefix && this.form.gnetwork.value === this.form.network.value;
    this.form[`${prefix}kimg`].value = (earlier ? this.network.times[0] : start.kimg) ?? "";
    this.form[`${prefix}average`].value = isLength ? "length" : start.ema ?? "";
    this.form[`${prefix}ema`].value = isLength ? start.ema : (tracked.at(-1) ?? 0.1).toFixed(3);
  }

  /** Show the fields that have a meaning now, and bring sliders to the values beside them. */
  arrange() {
    const { form, network } = this;
    const guided = form.guide.value !== "none" || Boolean(info.classifier);
    const byNetwork = form.guide.value === "network" && network.denoiser && !info.classifier;
    const hint = $('[data-hint="network"]', form);
    hint.textContent = [network.about, network.obstacle].filter(Boolean).join("; no other averages: ");
    hint.title = network.name;
    for (const [prefix, there] of [["", true], ["g", byNetwork]]) {
      const { times, tracked, other_averages: others } = info.networks[form[`${prefix}network`].value] ?? network;
      show(form, `${prefix}kimg`, there && times.length > 0);
      show(form, `${prefix}average`, there && others.length > 0 && times.length > 0);
      show(form, `${prefix}ema`, there && tracked.length > 0 && form[`${prefix}average`].value === "length");
    }
    show(form, "gnetwork", byNetwork);
    show(form, "sampling", network.denoiser);
    show(form, "steps", network.denoiser && info.takes_steps[form.sampler.value]);
    $('[data-row="guidance"]', form).hidden = !network.denoiser;
    show(form, "guide", network.denoiser && !info.classifier);
    form.guide.options[1].disabled = !network.knows_none;
    show(form, "weight", network.denoiser && guided);
    show(form, "interval", network.denoiser && guided);
    show(form, "temperature", !network.denoiser);
    for (const slider of all("[data-for]", form)) {
      const value = Number(form[slider.dataset.for].value);
      if (!Number.isNaN(value)) slider.value = value;
    }
    $("h2", this.view).replaceChildren(...(panes.length > 1 ? [bold(this.letter)] : []), network.label);
    $("h2", this.view).title = network.name;
  }

  changed(field) {
    const { form } = this;
    const slides = field.dataset.for;
    if (slides) form[slides].value = slides.endsWith("ema") ? Number(field.value).toFixed(3) : field.value;
    if (field === form.network) {
      const guide = form.gnetwork.value;
      this.listAverages("");
      this.begin("");
      this.listGuides();
      if (form.gnetwork.value !== guide) {
        this.listAverages("g");
        this.begin("g");
      }
      if (!this.network.knows_none && form.guide.value === "itself") form.guide.value = "none";
    }
    if (field === form.gnetwork || (field === form.guide && field.value === "network")) {
      if (field === form.guide) form.gnetwork.value = form.network.value;
      this.listAverages("g");
      this.begin("g");
    }
    if (field === form.guide && field.value !== "none" && form.guidance.value === "1") form.guidance.value = "1.5";
    this.arrange();
    arrangeShared();
    const typed = field.matches('input:not([type="range"])');
    this.askSoon(typed ? TYPING : 0);
  }

  /** What the server is asked for. */
  request() {
    const { form, values, network } = this;
    const choice = (prefix) => {
      const kimg = form[`${prefix}kimg`].disabled ? null : Number(values[`${prefix}kimg`]);
      const average = values[`${prefix}average`];
      const ema = form[`${prefix}kimg`].disabled ? null : average === "length" ? values[`${prefix}ema`].trim() : average;
      return { network: Number(values[`${prefix}network`]), kimg, ema };
    };
    const options = [];
    const add = (name, value) => value.trim() !== "" && options.push(`--${name}=${value.trim()}`);
    for (const name of ["sampler", "steps", "guidance", "temperature"]) {
      if (!form[name].disabled) add(name, values[name]);
    }
    if (!form.lo.disabled && (values.lo.trim() || values.hi.trim())) {
      add("guidance-interval", `${values.lo.trim() || 0},${values.hi.trim() || "inf"}`);
    }
    if (network.classes || info.classifier) add("class", shared.class.value);
    if (network.text) shared.prompt.value.split("\n").forEach((line) => add("prompt", line));
    const guide = form.guide.disabled ? "none" : values.guide;
    const setting = { main: choice(""), guide, options, more: values.more };
    if (guide === "network") setting.guiding = choice("g");
    return {
      pane: tab + this.letter,
      seed: shared.seed.value,
      images: Number(shared.images.value),
      path_of: shared.path.checked ? chosen : null,
      setting,
    };
  }

  /** Ask for images when nothing has changed for so many ms. */
  askSoon(delay) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.timer = null;
      this.ask();
    }, delay);
  }

  /** Ask for images. While the last ones are being made, wait for those, unless they take long. */
  async ask() {
    save();
    if (this.running) {
      this.waiting = true;
      const left = this.running.since + PATIENCE - performance.now();
      const { controller } = this.running;
      setTimeout(() => this.waiting && controller.abort(), Math.max(left, 0));
      return;
    }
    const running = { controller: new AbortController(), since: performance.now() };
    this.running = running;
    const busy = setTimeout(() => this.view.setAttribute("aria-busy", "true"), BUSY);
    try {
      const result = await this.fetch(running.controller.signal);
      if (!result.superseded) this.show(result);
    } catch (error) {
      if (error.name !== "AbortError") this.show({ error: error.refusal ?? `${GONE} (${error.message})` });
    }
    clearTimeout(busy);
    this.running = null;
    if (this.waiting) {
      this.waiting = false;
      this.ask();
    } else {
      this.view.setAttribute("aria-busy", "false");
    }
  }

  /** The last line that the server sends; those before say how far it is. */
  async fetch(signal) {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("api/images", { method: "POST", headers, body: JSON.stringify(this.request()), signal });
    if (!response.ok) throw Object.assign(new Error(), { refusal: (await response.text()).trim() });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const bar = $(".bar div", this.view);
    let text = "";
    let last;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return last;
      const lines = (text + value).split("\n");
      text = lines.pop();
      for (const line of lines) {
        last = JSON.parse(line);
        bar.style.width = `${100 * (last.progress ?? 1)}%`;
      }
    }
  }

  show(result) {
    const error = $(".error", this.view);
    error.hidden = !result.error;
    error.textContent = result.error ?? "";
    this.element.classList.toggle("stale", Boolean(result.error));
    $(".bar div", this.view).style.width = "0";
    if (result.error) return;
    this.view.classList.toggle("small", result.resolution <= SMALL);
    this.showImages(result);
    const path = $(".path", this.view);
    path.replaceChildren(...result.path.map(({ sigma, png }) => {
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      caption.textContent = number(sigma);
      figure.append(picture(png, `at noise level ${number(sigma)}`), caption);
      return figure;
    }));
    const evaluations = result.evaluations === null ? [] : [`${result.evaluations} evaluations`];
    const facts = [...evaluations, `${result.seconds.toFixed(2)} s`].join(", ");
    const latents = result.are_latents ? ["These are latents, which nothing here decodes, as brightness"] : [];
    $(".status", this.view).textContent = [facts, ...latents, ...result.notes].join("\n");
    $("code", this.element).textContent = result.command;
  }

  showImages({ images }) {
    const cells = $(".cells", this.view);
    const labelled = images.some(({ label }) => label);
    while (cells.children.length > images.length) cells.lastChild.remove();
    images.forEach(({ png, seed, label }, i) => {
      let cell = cells.children[i];
      if (!cell) {
        cell = document.createElement("button");
        cell.type = "button";
        cell.className = "cell";
        cell.append(new Image(), document.createElement("span"));
        cells.append(cell);
      }
      const text = `seed ${seed}${label ? `, ${label}` : ""}`;
      cell.title = text;
      cell.firstChild.src = `data:image/png;base64,${png}`;
      cell.firstChild.alt = text;
      cell.lastChild.hidden = !labelled;
      cell.lastChild.textContent = label;
    });
    cells.style.gridTemplateColumns = `repeat(${COLUMNS[images.length]}, minmax(0, 1fr))`;
    this.mark();
  }

  /** Show which image is chosen; arrow keys go from there. */
  mark() {
    all(".cell", this.view).forEach((cell, i) => {
      cell.setAttribute("aria-pressed", String(i === chosen && shared.path.checked));
      cell.tabIndex = i === chosen ? 0 : -1;
    });
  }

  walk(event) {
    const columns = COLUMNS[shared.images.value];
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    const cell = all(".cell", this.view)[chosen + step];
    if (step === undefined) return;
    event.preventDefault();
    if (cell) {
      choose(cell);
      cell.focus();
    }
  }

  async copy(button) {
    const code = $("code", this.element);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Press Ctrl-C";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
}
