/**
 * The tests: behaviour, through real sockets, files, processes and real browsers.
 *
 * @module
 */

/// <reference lib="dom" />

import { assert, assertEquals, assertMatch } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
import { type ChatOptions, startChat } from "./main.ts";

Deno.test("two clients see what one of them says", async () => {
  await using chat = await startChat({ port: 0, db: ":memory:", log: false });
  const clients = [1, 2].map(() => new WebSocket(`ws://127.0.0.1:${chat.addr.port}/`));
  await Promise.all(clients.map((client) => new Promise((resolve) => client.onopen = resolve)));
  const heard = clients.map((client) => new Promise<MessageEvent>((resolve) => client.onmessage = resolve));
  clients[0].send(JSON.stringify({ event: "send_message", username: "Ada", message: "Hi" }));
  for (const { data } of await Promise.all(heard)) assertMatch(data, /"username":"Ada","message":"Hi"/);
  const closed = clients.map((client) => new Promise((resolve) => client.onclose = resolve));
  for (const client of clients) client.close();
  await Promise.all(closed);
});

// ───────────────────────────────────────────────── What tests use ─────────────────────────────────────────────────

/** Which are wanted: those of the "room", of "Chromium1", "Chromium2" or "WebKit", which the task runs side by side; or all. */
const PART = new URL(import.meta.url).search.slice(1);
const test = (!PART || PART === "room" ? Deno.test : () => {}) as typeof Deno.test;

const PAGE = new URL("./index.html", import.meta.url);
const SOAK = Number(Deno.env.get("SOAK") ?? 0); // seconds that the soak lasts, where there is to be one
const DEADLINE = 15_000; // ms after which what is waited for never comes
const encoder = new TextEncoder(), decoder = new TextDecoder();

/**
 * The one way to wait: resolves with what `look` gives, as soon as that is truthy. It looks again whenever `change`
 * resolves; what cannot tell of its changes is looked at every 10 ms.
 */
async function until<T>(
  look: () => T,
  change: () => Promise<unknown> = () => new Promise((resolve) => setTimeout(resolve, 10)),
  state: () => unknown = () => "",
): Promise<NonNullable<Awaited<T>>> {
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => late.reject(new Error(`never came true: ${look}\n${state()}`)), DEADLINE);
  try {
    while (true) {
      const changed = change(), seen = await Promise.race([look(), late.promise]);
      if (seen) return seen;
      await Promise.race([changed, late.promise]);
    }
  } finally {
    clearTimeout(timer);
  }
}

/** Tells those who wait that something changed. */
class Change {
  #next = Promise.withResolvers<void>();

  readonly next = (): Promise<void> => this.#next.promise;

  now(): void {
    this.#next.resolve();
    this.#next = Promise.withResolvers();
  }
}

/** An event as a client receives it; which fields there are depends on the kind. */
interface Received {
  event: string;
  seq: number;
  time: number;
  username: string;
  message: string;
  id: string;
  tag: string;
  error: string;
  retry_after: number;
  oldest: number;
  resumed: boolean;
  before: number;
  messages: Received[];
  online: number;
  users: string[];
  joined: string[];
  left: string[];
}

/** What a client may send: an event, or a frame that is none. */
type Frame = string | Uint8Array<ArrayBuffer> | object;

/** Something that listens on a port of this machine. */
type Place = { addr: { port: number } };

/** A client of the chat that is not the page, over a real WebSocket. */
class Client {
  /** What was received, as it came. */
  readonly frames: string[] = [];
  /** The events in it. */
  readonly events: Received[] = [];
  /** How the connection ended, once it did. */
  closed?: CloseEvent;
  /** Who says what is said. */
  username = "Ada";
  readonly #socket: WebSocket;
  readonly #change = new Change();

  constructor(url: string, options?: { client?: Deno.HttpClient; headers?: Record<string, string> }) {
    this.#socket = new WebSocket(url, options as unknown as string); // the browser's type knows no options
    this.#socket.onopen = () => this.#change.now();
    this.#socket.onmessage = ({ data }) => {
      this.frames.push(data);
      for (const line of data.split("\n")) this.events.push(JSON.parse(line));
      this.#change.now();
    };
    this.#socket.onclose = (event) => {
      this.closed = event;
      this.#change.now();
    };
  }

  /** Connects, and joins if there is something to join with. */
  static async open(
    { addr: { port } }: Place,
    join?: { username?: string; [field: string]: unknown },
    headers?: Record<string, string>,
  ): Promise<Client> {
    const client = new Client(`ws://127.0.0.1:${port}/`, { headers });
    await client.until(() => client.opened);
    client.username = join?.username ?? client.username;
    if (join) await client.ask({ event: "join", ...join }, ({ event }) => event === "joined");
    return client;
  }

  get opened(): boolean {
    return this.#socket.readyState === WebSocket.OPEN;
  }

  /** Resolves with what `look` gives, as soon as that is truthy; it looks at each frame. */
  until<T>(look: () => T): Promise<NonNullable<Awaited<T>>> {
    const last = () => this.frames.slice(-5).map((frame) => frame.slice(0, 500)).join("\n") + (this.closed?.code ?? "");
    return until(look, this.#change.next, last);
  }

  /** Sends an event, or a frame that is none. */
  send(event: Frame): void {
    this.#socket.send(typeof event === "string" || event instanceof Uint8Array ? event : JSON.stringify(event));
  }

  /** Resolves with the first event, also of those that came already, that `test` likes. */
  has(test: (event: Received) => unknown, from = 0): Promise<Received> {
    return this.until(() => this.events.slice(from).find(test));
  }

  /** Resolves with the next event that is not here yet and that `test` likes. */
  next(test: (event: Received) => unknown): Promise<Received> {
    return this.has(test, this.events.length);
  }

  /** Sends, and resolves with the first event after that which `test` likes. */
  ask(event: Frame, test: (event: Received) => unknown = () => true): Promise<Received> {
    const answer = this.next(test);
    this.send(event);
    return answer;
  }

  /** Says these, and resolves with the last when it has come back. */
  say(...messages: string[]): Promise<Received> {
    const id = crypto.randomUUID(), last = messages.pop();
    for (const message of messages) this.send({ username: this.username, message });
    return this.ask({ username: this.username, message: last, id }, (event) => event.id === id);
  }

  /** The messages that were received; what came before a join was answered comes again after it. */
  messages(): Received[] {
    const joined = this.events.findLastIndex(({ event }) => event === "joined");
    return this.events.slice(joined + 1).filter(({ event }) => event === "receive_message");
  }

  /** Resolves when the connection has ended, with how. */
  ended(): Promise<CloseEvent> {
    return this.until(() => this.closed);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#socket.close();
    await this.ended();
  }
}

/** A chat that keeps, logs and limits nothing, on a port of its own. */
const start = (options: ChatOptions = {}) =>
  startChat({ port: 0, db: ":memory:", log: false, rateLimit: 0, ...options });

/** Asserts that the event has these fields and no others. */
function assertEvent(event: Received | undefined, expected: Partial<Received>): void {
  assertEquals<unknown>(event, expected);
}

/** Whether an event is of this kind. */
const is = (kind: string) => ({ event }: Received): boolean => event === kind;
const texts = (events: Received[]): string[] => events.map(({ message }) => message);
const seqs = (events: Received[]): number[] => events.map(({ seq }) => seq);
const count = (from: number, to: number): number[] => Array.from({ length: to - from + 1 }, (_, i) => from + i);
const numbered = (length: number, what = "message"): string[] => count(1, length).map((i) => `${what} ${i}`);

/** Puts something in the place of a method until the end of the block. */
function patch<T, K extends keyof T>(target: T, name: K, method: T[K]): Disposable {
  const original = target[name];
  target[name] = method;
  return { [Symbol.dispose]: () => void (target[name] = original) };
}

/** Sets the monotonic clock forward until the end of the block. */
function later(ms: number): Disposable {
  const now = performance.now.bind(performance);
  return patch(performance, "now", () => now() + ms);
}

/** Takes what is written to standard error until the end of the block. */
function muteErrors(take: (text: string) => void = () => {}): Disposable {
  return patch(Deno.stderr, "write", (bytes) => {
    take(decoder.decode(bytes));
    return Promise.resolve(bytes.length);
  });
}

/** A folder that is gone with the test, and in it a file for a database. */
async function temporary(): Promise<AsyncDisposable & { db: string; folder: string }> {
  const folder = await Deno.makeTempDir();
  return { db: `${folder}/chat.db`, folder, [Symbol.asyncDispose]: () => Deno.remove(folder, { recursive: true }) };
}

/** The permissions that the start task gives. */
const FLAGS: string[] = JSON.parse(await Deno.readTextFile(new URL("deno.json", import.meta.url)))
  .tasks.start.command.match(/--allow-\S+/g);

/** How the program is started. */
interface Start {
  /** The task that starts it. Default: none, but what the start task does, with any disk. */
  task?: string;
  /** The working folder. */
  cwd?: string;
  /** What the shell does, to which the command is given. */
  shell?: string;
  /** Whether somebody reads what it prints. Default: true. */
  reads?: boolean;
}

/** The program itself, in a process of its own. */
class Program {
  /** What it printed. */
  output = "";
  readonly addr: { port: number };
  readonly #process: Deno.ChildProcess;
  #status?: Deno.CommandStatus;
  #reading: Promise<unknown> = Promise.resolve();
  readonly #change = new Change();
  readonly #task?: string;

  constructor(env: Record<string, string> = {}, { task, cwd, shell, reads = true }: Start = {}) {
    const run = ["run", "--no-prompt", ...FLAGS.filter((flag) => !/read|write/.test(flag)), "-RW", "main.ts"];
    const args = task ? ["task", "-q", task] : run;
    this.addr = { port: Number(env.PORT ?? 0) };
    this.#task = task;
    this.#process = new Deno.Command(shell ? "sh" : Deno.execPath(), {
      args: shell ? ["-c", shell, "sh", Deno.execPath(), ...args] : args,
      cwd,
      env: { PORT: "0", CHAT_DB: ":memory:", CHAT_RATE_LIMIT: "0", ...env },
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.#process.status.then((status) => {
      this.#status = status;
      this.#change.now();
    });
    if (reads) this.read();
  }

  /** Begins to read what it prints. */
  read(): void {
    this.#reading = Promise.all([this.#process.stdout, this.#process.stderr].map(async (stream) => {
      for await (const text of stream.pipeThrough(new TextDecoderStream())) {
        this.output += text;
        this.#change.now();
      }
    }));
  }

  /** Starts the program and resolves when it is open. */
  static async start(env?: Record<string, string>): Promise<Program> {
    const program = new Program(env);
    await program.opened();
    return program;
  }

  /** Resolves with what it printed when it was open. */
  async opened(): Promise<string> {
    const [line, port] = await this.says(/.*open: https?:\/\/\S+:(\d+)\/.*\n/);
    this.addr.port = Number(port);
    return line;
  }

  /** Resolves when it serves, on a port that is known. */
  async serves(): Promise<void> {
    const health = `http://127.0.0.1:${this.addr.port}/healthz`;
    await until(() =>
      fetch(health).then(async (response) => (await response.body?.cancel(), response.ok), () => false)
    );
  }

  get pid(): number {
    return this.#process.pid;
  }

  /** Resolves when the program has printed this. */
  says(pattern: RegExp): Promise<RegExpMatchArray> {
    const look = () => {
      const match = this.output.match(pattern);
      if (this.#status && !match) throw new Error(`ended without ${pattern}:\n${this.output}`);
      return match;
    };
    return until(look, this.#change.next, () => `${pattern}\n${this.output}`);
  }

  /** Resolves with its status, when it has ended by itself. */
  async ended(): Promise<Deno.CommandStatus> {
    const status = await until(() => this.#status, this.#change.next, () => this.output);
    await this.#reading;
    return status;
  }

  /** Sends it a signal and resolves with its status, when it has ended. */
  end(signal: Deno.Signal = "SIGTERM"): Promise<Deno.CommandStatus> {
    try {
      this.#process.kill(signal);
    } catch {
      // It has ended already.
    }
    return this.ended();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end(this.#task ? "SIGTERM" : "SIGKILL"); // a task passes on what can be caught
  }
}

/** A good handshake. */
const HANDSHAKE = [
  "GET / HTTP/1.1",
  "Host: chat.test",
  "Upgrade: websocket",
  "Connection: Upgrade",
  "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
  "Sec-WebSocket-Version: 13",
];

/** A client that writes its bytes itself, and reads only when it is told to. */
class Raw {
  readonly #conn: Deno.Conn;
  #unread = new Uint8Array();

  private constructor(conn: Deno.Conn) {
    this.#conn = conn;
  }

  /** Connects and sends these lines. */
  static async connect(to: number | Deno.Conn, ...lines: string[]): Promise<Raw> {
    const raw = new Raw(typeof to === "number" ? await Deno.connect({ port: to }) : to);
    await raw.bytes(encoder.encode([...lines, "", ""].join("\r\n")));
    return raw;
  }

  /** Connects, with headers besides those of a good handshake, and resolves when that was accepted. */
  static async open(to: number | Deno.Conn, ...headers: string[]): Promise<Raw> {
    const raw = await Raw.connect(to, ...HANDSHAKE, ...headers);
    assertEquals(await raw.status(), 101);
    return raw;
  }

  async bytes(bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length;) at += await this.#conn.write(bytes.subarray(at));
  }

  /** Sends a frame: text, final and masked, unless its first byte or its length are to say something else. */
  frame(payload: string | Uint8Array | object, { head = 0x81, masked = true, length = -1 } = {}): Promise<void> {
    const text = typeof payload === "string" ? payload : JSON.stringify(payload);
    const body = payload instanceof Uint8Array ? payload : encoder.encode(text);
    const size = length < 0 ? body.length : length;
    const start = size < 126 ? [size] : size < 65_536 ? [126, size >> 8, size & 255] : [127, 0, 0, 0, 0];
    if (size >= 65_536) start.push(size >>> 24, size >> 16 & 255, size >> 8 & 255, size & 255);
    if (masked) start[0] |= 0x80;
    // A key of zeros leaves the payload as it is.
    return this.bytes(new Uint8Array([head, ...start, ...masked ? [0, 0, 0, 0] : [], ...body]));
  }

  /** Waits for at least so many bytes; false if the connection ended before. */
  async #read(size: number): Promise<boolean> {
    const buffer = new Uint8Array(65_536);
    while (this.#unread.length < size) {
      const read = await this.#conn.read(buffer).catch(() => null);
      if (read === null) return false;
      const joined = new Uint8Array(this.#unread.length + read);
      joined.set(this.#unread);
      joined.set(buffer.subarray(0, read), this.#unread.length);
      this.#unread = joined;
    }
    return true;
  }

  /** Takes so many bytes of what was read. */
  #take(size: number): Uint8Array {
    const taken = this.#unread.subarray(0, size);
    this.#unread = this.#unread.subarray(size);
    return taken;
  }

  /** What was read and not taken. */
  get unread(): string {
    return new TextDecoder().decode(this.#unread);
  }

  /** The head of an HTTP response. */
  async head(): Promise<string> {
    let head = "";
    while (!head.endsWith("\r\n\r\n") && await this.#read(1)) head += String.fromCharCode(this.#take(1)[0]);
    return head;
  }

  /** The status of an HTTP response. */
  async status(): Promise<number> {
    return Number((await this.head()).split(" ")[1]);
  }

  /** The next text or what a pong says, or the code of a close frame; undefined when the connection has ended. */
  async next(): Promise<string | number | undefined> {
    while (await this.#read(2)) {
      const short = this.#unread[1] & 127, start = short === 127 ? 10 : short === 126 ? 4 : 2;
      if (!await this.#read(start)) return undefined;
      const view = new DataView(this.#unread.buffer, this.#unread.byteOffset);
      const size = short === 127 ? Number(view.getBigUint64(2)) : short === 126 ? view.getUint16(2) : short;
      if (!await this.#read(start + size)) return undefined;
      const kind = this.#take(start)[0] & 15, body = this.#take(size);
      if (kind === 1 || kind === 10) return decoder.decode(body);
      if (kind === 8) return size >= 2 ? body[0] << 8 | body[1] : undefined;
    }
    return undefined;
  }

  /** Reads frames until the connection ends: the events, and the code of a close frame. */
  async drain(): Promise<{ events: Received[]; code?: number }> {
    const events: Received[] = [];
    let frame;
    while (typeof (frame = await this.next()) === "string") {
      for (const line of frame.split("\n")) events.push(JSON.parse(line));
    }
    this[Symbol.dispose]();
    return { events, code: frame };
  }

  [Symbol.dispose](): void {
    try {
      this.#conn.close();
    } catch {
      // It is closed already.
    }
  }
}

/** Writes the certificate and its key into a folder. */
async function certificate(folder: string): Promise<{ tlsCert: string; tlsKey: string }> {
  const paths = { tlsCert: `${folder}/cert.pem`, tlsKey: `${folder}/key.pem` };
  await Deno.writeTextFile(paths.tlsCert, CERTIFICATE);
  await Deno.writeTextFile(paths.tlsKey, KEY);
  return paths;
}

/** A port that nobody listens on. */
function freePort(): number {
  using listener = Deno.listen({ port: 0 });
  return listener.addr.port;
}

/** Whether a program is there that a test needs beside Deno. Where it is not, the test is ignored, except in CI. */
async function isMissing(program: string, ...args: string[]): Promise<boolean> {
  if (Deno.env.has("CI")) return false;
  try {
    await new Deno.Command(program, { args, stdout: "null", stderr: "null" }).output();
    return false;
  } catch {
    return true;
  }
}

const NO_SHELL = await isMissing("sh", "-c", "");

// ──────────────────────────────────────────────────── The room ────────────────────────────────────────────────────

test("the page comes at /, as small as the browser takes it, and nothing else comes elsewhere", async () => {
  await using chat = await start();
  const ask = async (path: string, method = "GET", headers = {}) => {
    const response = await fetch(`http://127.0.0.1:${chat.addr.port}${path}`, { method, headers });
    return { status: response.status, body: await response.text(), headers: response.headers };
  };
  const page = await ask("/");
  assertEquals([page.status, page.headers.get("content-type")], [200, "text/html; charset=utf-8"]);
  assertEquals(page.body, await Deno.readTextFile(PAGE));
  const head = await ask("/", "HEAD");
  assertEquals([head.status, head.body], [200, ""]);
  assertEquals([(await ask("/healthz")).status, (await ask("/healthz")).body], [200, "ok\n"]);
  assertEquals((await ask("/index.html")).status, 404);
  assertEquals((await ask("/main.ts", "POST")).status, 404);
  const post = await ask("/", "POST");
  assertEquals([post.status, post.headers.get("allow")], [405, "GET, HEAD"]);
  for (const [accept, encoding] of [["gzip, br", "br"], ["gzip", "gzip"], ["identity", undefined]]) {
    using raw = await Raw.connect(chat.addr.port, "GET / HTTP/1.1", "Host: chat.test", `Accept-Encoding: ${accept}`);
    const head = (await raw.head()).replace(/\r\ndate: .*/i, "");
    assertEquals(head.match(/\r\ncontent-encoding: (\w+)/i)?.[1], encoding);
    using brief = await Raw.connect(chat.addr.port, "HEAD / HTTP/1.1", "Host: chat.test", `Accept-Encoding: ${accept}`);
    assertEquals((await brief.head()).replace(/\r\ndate: .*/i, ""), head);
  }
});

test("the room has the name that it is given, which is text wherever it is put", async () => {
  await using program = await Program.start({ CHAT_TITLE: `<b>"Ada" & $&'s</b>` });
  await program.says(/^<b>"Ada" & \$&'s<\/b> is open: /m);
  const html = await (await fetch(`http://127.0.0.1:${program.addr.port}/`)).text();
  const escaped = String.raw`&lt;b&gt;("|&quot;)Ada("|&quot;) &amp; \$&amp;('|&#39;)s&lt;/b&gt;`;
  assertMatch(html, new RegExp(`<title>${escaped}</title>[^]*<h1[^>]*>${escaped}</h1>`));
});

test("a plain client gets a message a frame and nothing it did not ask for", async () => {
  await using chat = await start();
  await using plain = await Client.open(chat);
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.has(is("presence"));
  ada.send({ event: "typing" });
  await ada.say(...numbered(50));
  await plain.until(() => plain.messages().length === 50);
  assertEquals(plain.frames.length, 50);
  assertEquals(texts(plain.events), numbered(50));
});

test("what is wrong is refused, to its sender alone, and changes nothing", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  await using grace = await Client.open(chat);
  const ok = { event: "send_message", username: "Ada", message: "Hi", id: "ok" };
  const long = "x".repeat(2001), join = { event: "join" };
  const wrong: [string, Frame[], string?][] = [
    ["must be JSON", ["not JSON", ""]],
    ["JSON object", ["null", "[1]"]],
    ["event must be", ["{}", { event: "shout" }, { event: "__proto__" }]],
    ["must be text", [new Uint8Array(4)]],
    ["message must be 1 to 2000", ["", " \n\t ", long, 5, undefined].map((message) => ({ ...ok, message })), "ok"],
    ["username must be 1 to 40", [long, "\u200b\u202e\0", 5, undefined].map((username) => ({ ...ok, username })), "ok"],
    ["id must be 1 to 64", ["", "x".repeat(65), "a b", 7].map((id) => ({ ...ok, id }))],
    ["username must be 1 to 40", [{ ...join, username: " " }]],
    ["since must be a whole number", [-1, 0.5, "0"].map((since) => ({ ...join, since }))],
    [
      "key must be 16 to 128",
      ["x".repeat(15), "x".repeat(129), "it is not one of it"].map((key) => ({ ...join, key })),
    ],
    ["password must be", [{ ...join, password: 5 }]],
    ["before must be a whole number", [undefined, "1"].map((before) => ({ event: "history", before }))],
  ];
  for (const [reason, frames, id] of wrong) {
    for (const frame of frames) {
      const error = await ada.ask(frame, is("error"));
      assertMatch(error.error, new RegExp(reason));
      assertEquals(error.id, id!);
    }
  }
  assertMatch((await grace.ask({ event: "history", before: 1 })).error, /join before/);
  assertMatch((await grace.ask({ event: "typing" })).error, /join/);
  assertEquals((await ada.say("Hi")).seq, 1);
  await grace.until(() => grace.messages().length === 1);
  assertEquals(grace.events.length, 3);
});

test("a name is cleaned, then normalised, and a message is kept as it was typed", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat);
  const said = async (name: string, text: string) => {
    ada.username = name;
    const { username, message } = await ada.say(text);
    return [username, message];
  };
  assertEquals(await said(" A\u0000d\u200ba\u202e \n\t Love\u2028lace\u00ad ", "x"), ["Ada Love lace", "x"]);
  assertEquals(await said("Jose\u200d\u0301", "x"), ["Jos\u00e9", "x"]);
  assertEquals(await said("Gi\u0323\u0307\u0301l Zoe\u0307", "x"), ["G\u1ecb\u0301l Zo\u0117", "x"]); // an i has its dot
  assertEquals(await said("I\u0307 \u0131\u0307 Ju\u0308\u0308", "x"), ["\u0130 \u0131 J\u00fc", "x"]);
  assertEquals(await said("\u00ed\u0307\u0301 o\u0333\u0347\u0333\u0347", "x"), ["\u00ed o\u0333\u0347", "x"]);
  // A letter and a mark that look like another letter, though Unicode does not take them for it.
  assertEquals(await said("So\u0337n \u06cc\u0654 \u0648\u065a\u0670 \u025f\u0307", "x"), [
    "Son \u06cc \u0648 \u025f",
    "x",
  ]);
  assertEquals(await said("S\u00f8n \u064a\u0654 \u06c6", "x"), ["S\u00f8n \u0626 \u06c6", "x"]);
  assertEquals(await said("\u0301Ada \u200d\u0335 b", "x"), ["Ada b", "x"]); // marks of nothing
  assertEquals(await said("Ada\ufffc\ufb37\ue000\u{13441}", "x"), ["Ada", "x"]); // a blank, or none at all, in many fonts
  assertEquals(await said("Ada", "\n  a\n\n  b\u202e \u200b"), ["Ada", "a\n\n  b\u202e \u200b"]);
  assertEquals(await said("Ada", "a\u0000b\ud800c"), ["Ada", "a\ufffdb\ufffdc"]);
  assertEquals(await said("Ada", '"\\\u2028</script>\u0007'), ["Ada", '"\\\u2028</script>\u0007']);
  assertEquals(await said("a".repeat(40), "👩‍🚀".repeat(400)), ["a".repeat(40), "👩‍🚀".repeat(400)]);
  assertEquals(await said("Ada", `  ${"x".repeat(2000)}  `), ["Ada", "x".repeat(2000)]);
});

test("joining answers with what was missed, in order, then who is here", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  const { time } = await ada.say(...numbered(250));

  await using grace = await Client.open(chat, { username: " Gra\u0301ce ", since: 240 });
  const { users, online } = await grace.has(is("presence"));
  assertEquals([users.sort(), online], [["Ada", "Gr\u00e1ce"], 2]);
  assertEvent(grace.events[0], { event: "joined", seq: 250, oldest: 1, resumed: true, username: "Gr\u00e1ce" });
  assertEquals(seqs(grace.events.slice(1, 11)), count(241, 250));
  await ada.say("new");
  await grace.until(() => grace.messages().at(-1)?.message === "new");
  assertEquals(seqs(grace.messages()), count(241, 251));
  const again = { event: "joined", seq: 251, oldest: 1, resumed: true };
  assertEvent(await grace.ask({ event: "join", since: 250, time }, is("joined")), again);

  await using lin = await Client.open(chat, { username: "Lin" });
  assertEquals(lin.events.find(is("joined"))?.resumed, false);
  await lin.until(() => lin.messages().length === 200);
  assertEquals(seqs(lin.messages()), count(52, 251));
});

test("a client goes on after what it saw only where the room still has that, or had it", async () => {
  await using file = await temporary();
  await using backup = await temporary();
  const seen: Received[] = [];
  {
    await using chat = await start({ ...file, history: 5 });
    await using ada = await Client.open(chat, { username: "Ada" });
    for (const text of numbered(3)) seen.push(await ada.say(text));
  }
  await Deno.copyFile(file.db, backup.db);
  /** What a client is given that saw this message last. */
  const resume = async (chat: Place, { seq, time }: { seq: number; time?: number }) => {
    await using client = await Client.open(chat, { since: seq, time });
    const { resumed, seq: newest } = client.events.find(is("joined"))!;
    await client.until(() => newest === seq && resumed || client.messages().at(-1)?.seq === newest);
    return [resumed, ...texts(client.messages())];
  };
  {
    await using chat = await start({ ...file, history: 5 });
    await using ada = await Client.open(chat, { username: "Ada" });
    for (const text of ["4", "5", "6", "7", "8"]) seen.push(await ada.say(text));
    assertEquals(await resume(chat, seen[4]), [true, "6", "7", "8"]);
    assertEquals(await resume(chat, { seq: 5 }), [true, "6", "7", "8"]);
    assertEquals(await resume(chat, seen[7]), [true]);
    // Message 3 is deleted, but nothing is missing after it; after message 2 there is.
    assertEquals(await resume(chat, seen[2]), [true, "4", "5", "6", "7", "8"]);
    assertEquals(await resume(chat, seen[1]), [false, "4", "5", "6", "7", "8"]);
    assertEquals(await resume(chat, { seq: 5, time: seen[4].time - 1 }), [false, "4", "5", "6", "7", "8"]);
    assertEquals(await resume(chat, { seq: 9 }), [false, "4", "5", "6", "7", "8"]);
  }
  await using restored = await start({ ...backup, history: 5 });
  await using grace = await Client.open(restored, { username: "Grace" });
  assertEquals(await resume(restored, seen[2]), [true]);
  assertEquals(await resume(restored, seen[7]), [false, "message 1", "message 2", "message 3"]);
  await grace.say("4", "5", "other 6");
  assertEquals((await resume(restored, seen[4])).slice(0, 2), [false, "message 2"]);
});

test("messages of one key carry one tag that nobody else can have", async () => {
  await using file = await temporary();
  await using program = await Program.start({ CHAT_DB: file.db });
  const key = "a-secret-of-the-client", own = { event: "receive_message", username: "Ada" };
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", encoder.encode(key)));
  const tag = digest.toBase64({ alphabet: "base64url" }).slice(0, 12);
  await using ada = await Client.open(program, { username: "Ada", key });
  await using tab = await Client.open(program, { username: "Ada again", key });
  await using mallory = await Client.open(program, { username: "Ada" });
  await using plain = await Client.open(program);
  assertEquals([ada, tab, mallory].map(({ events }) => events[0].tag as unknown), [tag, tag, undefined]);
  const { seq, time, id, ...said } = await ada.say("Hi");
  assertEvent(said as Received, { ...own, message: "Hi", tag });
  assert(seq && time && id);
  assertEquals((await tab.say("Hi")).tag, tag);
  for (const client of [mallory, plain]) {
    const forged = { username: "Ada", message: "It is me", tag, key, id: crypto.randomUUID() };
    assert(!("tag" in await client.ask(forged, ({ id }) => id === forged.id)));
  }
  await plain.until(() => plain.events.length === 4);
  assertEquals(plain.events.map((event) => event.tag as unknown), [tag, tag, undefined, undefined]);
  await program.end();
  await using again = await start(file);
  assertEquals((await everything(again)).map((event) => event.tag as unknown), [tag, tag, undefined, undefined]);
  assert(!program.output.includes(key));
  for await (const { name } of Deno.readDir(file.folder)) {
    assert(!new TextDecoder("latin1").decode(await Deno.readFile(`${file.folder}/${name}`)).includes(key), name);
  }
});

test("history pages back to the oldest message that is kept", async () => {
  await using chat = await start({ history: 300 });
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.say(...numbered(700));

  await using grace = await Client.open(chat, { username: "Grace", since: 0 });
  const { seq, oldest, resumed } = grace.events[0];
  assertEquals([seq, oldest, resumed], [700, 401, false]);
  await grace.until(() => grace.messages().length === 300);
  assertEquals(seqs(grace.messages()), count(401, 700));

  const seen: number[] = [];
  for (let before = 701; before > oldest; before = seen[0]) {
    const page = await grace.ask({ event: "history", before }, is("history"));
    assertEquals(page.before, before);
    assert(page.messages.length > 0 && page.messages.length <= 200);
    seen.unshift(...seqs(page.messages));
  }
  assertEquals(seen, count(401, 700));
  assertEquals((await grace.ask({ event: "history", before: oldest }, is("history"))).messages, []);
});

test("long messages are paged so that a reader can take them", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  const long = "\u0001".repeat(2000); // six characters each on the wire
  await ada.say(...count(1, 200).map(() => long));
  await using grace = await Client.open(chat, { username: "Grace" });
  await grace.until(() => grace.messages().length === 200);
  assertEquals(seqs(grace.messages()), count(1, 200));
  const { messages } = await grace.ask({ event: "history", before: 201 }, is("history"));
  assert(messages.length > 0 && JSON.stringify(messages).length < 1 << 20);
  assertEquals(messages.at(-1)?.seq, 200);
});

test("pages of the history are sent as their reader reads, in the order in which it asked", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.say(...count(1, 200).map(() => "\u20ac".repeat(2000)));
  using raw = await Raw.open(chat.addr.port);
  await raw.frame({ event: "join" });
  const asked = count(1, 60).map((number) => 201 - number); // more than a client is sent that does not read
  for (const before of asked) await raw.frame({ event: "history", before });
  const answered: number[] = [];
  while (answered.length < asked.length) {
    const text = await raw.next();
    assert(typeof text === "string" && !text.includes('"error"'), `${text}`);
    for (const line of text.split("\n")) if (line.includes('"history"')) answered.push(JSON.parse(line).before);
  }
  assertEquals(answered, asked);
});

test("a client that asks for more pages than it reads is refused more of them", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.say(...count(1, 200).map(() => "\u20ac".repeat(2000)));
  using raw = await Raw.open(chat.addr.port);
  await raw.frame({ event: "join" });
  for (let i = 0; i < 1500; i++) await raw.frame({ event: "history", before: 201 });
  let text;
  while (typeof (text = await raw.next()) === "string" && !text.includes('"error"'));
  assertMatch(`${text}`, /^{"event":"error","error":"too many history requests[^"]*","retry_after":\d+}$/);
});

test("who read much before may leave no more small frames unread than others", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.say(...count(1, 50).map(() => "x".repeat(2000)));
  const { send } = WebSocket.prototype;
  let left = 0;
  using _untaken = patch(WebSocket.prototype, "send", function (this: WebSocket, data) {
    send.call(this, data);
    if (!`${data}`.startsWith('{"event":"error"')) return;
    left += `${data}`.length; // as if the kernel took none of them: it takes tens of megabytes, or few
    Object.defineProperty(this, "bufferedAmount", { value: left, configurable: true });
  });
  const unread = async (username: string, pages: number) => {
    using raw = await Raw.open(chat.addr.port);
    await raw.frame({ event: "join", username });
    while (pages-- > 0) {
      await raw.frame({ event: "history", before: 51 });
      while (!`${await raw.next()}`.startsWith('{"event":"history"'));
    }
    left = 0;
    const hasLeft = () => ada.events.some(({ left }) => left?.includes(username));
    try {
      while (!hasLeft()) await raw.frame({ event: "send_message", id: "i".repeat(64) });
    } catch {
      await ada.until(hasLeft); // the connection has ended
    }
    return left;
  };
  const fresh = await unread("Eve", 0), later = await unread("Lin", 200);
  assert(later < 1.3 * fresh, `${later} bytes, not ${fresh}`);
});

test("what many ask for at one moment is sent a share in each turn of the event loop", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.say(...count(1, 200).map(() => "x".repeat(2000)));
  const guests = await Promise.all(count(1, 100).map(() => Client.open(chat, { since: 200 })));
  const { send } = WebSocket.prototype;
  let [sent, most] = [0, 0];
  using _watched = patch(WebSocket.prototype, "send", function (this: WebSocket, data) {
    if (sent === 0) setImmediate(() => sent = 0);
    most = Math.max(most, sent += `${data}`.length);
    send.call(this, data);
  });
  for (const guest of guests) for (let i = 0; i < 5; i++) guest.send({ event: "history", before: 201 });
  await Promise.all(guests.map((guest) => guest.until(() => guest.events.filter(is("history")).length === 5)));
  for (const guest of guests) await guest[Symbol.asyncDispose]();
  assert(most < 500_000, `${most} characters in one turn`);
});

test("everyone who joined is told who comes, goes and types", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  assertEvent(await ada.has(is("presence")), { event: "presence", online: 1, users: ["Ada"] });
  const told = async (expected: Partial<Received>, what: () => unknown) => {
    const [change] = await Promise.all([ada.next(is("presence")), what()]);
    assertEvent(change, { event: "presence", joined: [], left: [], ...expected });
  };
  const grace = await Client.open(chat);
  await told({ online: 2, joined: ["Grace"] }, () => grace.send({ event: "join", username: "Grace" }));
  const twin = await Client.open(chat);
  await told({ online: 3 }, () => twin.send({ event: "join", username: "Grace" }));
  await told({ online: 2 }, () => twin[Symbol.asyncDispose]());
  await told({ online: 2, joined: ["Lin"], left: ["Grace"] }, () => grace.send({ event: "join", username: "Lin" }));
  const reader = await Client.open(chat);
  await told({ online: 3 }, () => reader.send({ event: "join" })); // someone who has no name yet
  await told({ online: 2 }, () => reader[Symbol.asyncDispose]());

  grace.send({ event: "typing" });
  assertEvent(await ada.next(is("typing")), { event: "typing", username: "Lin" });
  assertEvent(await grace.ask({ event: "ping" }, is("pong")), { event: "pong" });
  // Of two who type, one sends her message: after it she is not said to type.
  grace.send({ event: "typing" });
  grace.send({ username: "Lin", message: "done" });
  ada.send({ event: "typing" });
  await ada.has(({ event, username }) => event === "typing" && username === "Ada");
  const done = ada.events.findIndex(({ message }) => message === "done");
  assertEquals(ada.events.slice(done).filter(({ event, username }) => event === "typing" && username === "Lin"), []);
  await told({ online: 1, left: ["Lin"] }, () => grace[Symbol.asyncDispose]());
});

test("a rush of arrivals is a few frames for each", async () => {
  await using chat = await start();
  const names = numbered(150, "user");
  const clients = await Promise.all(names.map((username) => Client.open(chat, { username })));
  const told = clients.map(async (client) => {
    const known = () => client.events.flatMap(({ users = [], joined = [] }) => [...users, ...joined]);
    await client.until(() => new Set(known()).size === 150 && client.events.findLast(is("presence"))?.online === 150);
    return client.events.filter(is("presence")).length;
  });
  const frames = (await Promise.all(told)).reduce((sum, frames) => sum + frames);
  assert(frames < 150 * 40, `${frames} frames`);
  await Promise.all(clients.map((client) => client[Symbol.asyncDispose]()));
});

test("what is told of a rush is never more than a reader can take", async () => {
  using kv = await Deno.openKv(":memory:");
  await using chat = await start({ db: kv });
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.has(is("presence"));
  for (const instance of count(1, 24)) { // others that share the database, each with as many as fit into a value
    const users = count(1, 600).map((i) => `${instance} ${i} `.padEnd(40, "\u0800"));
    await kv.set(["chat", "here", `${instance}`], { online: 1000, users });
  }
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 24_001);
  for (const frame of ada.frames) assert(encoder.encode(frame).length < 1 << 20);
  await ada.say("still here");
});

// ─────────────────────────────────────────────────── The program ───────────────────────────────────────────────────

test("the program says where it is, logs each message, and ends when it is told to", async () => {
  await using program = await Program.start();
  await program.says(/^Chat is open: http:\/\/127\.0\.0\.1:\d+\/ .*:memory:.*\n/);
  await using ada = await Client.open(program, { username: "Ada" });
  ada.username = 'Eve"\nMessage received: 7 from "Ada';
  await ada.say("a secret");
  await program.says(/Message received: 1 from "Eve\\" Message received: 7 from \\"Ada", 8 characters\n/);
  assert(!program.output.includes("secret"));
  await ada.say(...numbered(500));
  await program.says(/Message received: \d+ at once, from \d+ on\n/);
  const begun = performance.now();
  const ending = program.end("SIGTERM");
  assertEquals((await ada.ended()).code, 1001);
  assertEquals((await ending).code, 0);
  assert(performance.now() - begun < 2000);
  const lines = program.output.split("\n").filter((line) => line.startsWith("Message received"));
  assert(lines.length < 400, `${lines.length} lines for 501 messages that came together`);
});

test("with CHAT_LOG=off the program says where it is and nothing more", async () => {
  await using program = await Program.start({ CHAT_LOG: "off" });
  await using ada = await Client.open(program);
  await ada.say("Hi");
  assertEquals((await program.end("SIGINT")).code, 0);
  assertMatch(program.output, /^Chat is open: .*\n$/);
});

test("settings that make no sense stop the start, which says why in one line", async () => {
  await using chat = await start();
  const tests: [Record<string, string>, RegExp][] = [
    [{ PORT: "abc" }, /PORT must be a whole number from 0 to 65535, not "abc"/],
    [{ PORT: "65536" }, /PORT must be/],
    [{ PORT: `${chat.addr.port}` }, /port.*taken/],
    [{ CHAT_LOG: "loud" }, /CHAT_LOG must be on or off/],
    [{ CHAT_HISTORY: "0" }, /CHAT_HISTORY must be a whole number from 1 to \d+, not "0"/],
    [{ CHAT_ALLOWED_ORIGINS: "chat.example" }, /CHAT_ALLOWED_ORIGINS must be/],
    [{ CHAT_DB: "/nowhere/chat.db" }, /database|nowhere/],
    [{ CHAT_TLS_CERT: "/nowhere/cert.pem", CHAT_TLS_KEY: "/nowhere/key.pem" }, /nowhere/],
  ];
  await Promise.all(tests.map(async ([env, reason]) => {
    await using program = new Program(env);
    assertEquals((await program.ended()).code, 1);
    assertMatch(program.output, /^.*\n$/);
    assertMatch(program.output, reason);
  }));
});

test("startChat() that cannot start says why and leaves nothing behind", async () => {
  await using chat = await start();
  const refused = async (options: object) =>
    await start(options).then(() => undefined, (error) => `${error.name}: ${error.message}`) ?? "no error";
  assertMatch(await refused({ port: chat.addr.port }), /^AddrInUse/);
  for (const db of ["/nowhere/chat.db", "/nowhere/x"]) await refused({ db, port: chat.addr.port });
  const whole = /^RangeError: history must be a whole number from 1 to \d+, not/;
  for (const history of [0, -1, 1.5, NaN, "5"]) assertMatch(await refused({ history }), whole);
  assertMatch(await refused({ port: 65_536 }), /^RangeError: port must be a whole number from 0 to 65535, not 65536/);
  assertMatch(await refused({ allowedOrigins: ["chat.example"] }), /^RangeError: allowedOrigins must be/);
  assertMatch(await refused({ log: "off" }), /^RangeError: log must be/);
  assertMatch(await refused({ idleTimeout: 0 }), /^RangeError: idleTimeout must be/);
});

test("the room is chat.db in the working folder, and a copy of the folder is the same room", async () => {
  await using file = await temporary();
  const task = (cwd: string) => new Program({ CHAT_DB: "" }, { task: "start", cwd });
  const files = ["deno.json", "main.ts", "index.html"];
  await Deno.mkdir(`${file.folder}/room`);
  for (const name of files) await Deno.copyFile(new URL(name, import.meta.url), `${file.folder}/room/${name}`);
  {
    await using program = task(`${file.folder}/room`);
    assertMatch(await program.opened(), /\(messages in chat\.db\)/);
    await using ada = await Client.open(program, { username: "Ada" });
    await ada.say("kept");
    await program.end();
  }
  await Deno.mkdir(`${file.folder}/copy`);
  for await (const { name } of Deno.readDir(`${file.folder}/room`)) {
    await Deno.copyFile(`${file.folder}/room/${name}`, `${file.folder}/copy/${name}`);
  }
  await using copy = task(`${file.folder}/copy`);
  await copy.opened();
  assertEquals(texts(await everything(copy)), ["kept"]);
  await copy.end();
});

test("a start that lacks a permission says what to run, and that runs", async () => {
  await using file = await temporary();
  const { tlsCert, tlsKey } = await certificate(file.folder);
  const paths = { CHAT_DB: file.db, CHAT_TLS_CERT: tlsCert, CHAT_TLS_KEY: tlsKey };
  await using refused = new Program(paths, { task: "start" });
  assertEquals((await refused.ended()).code, 1);
  assertMatch(refused.output, /^.*\n$/);
  const [, flags] = refused.output.match(/FLAGS="([^"]+)" deno task start/)!;
  await using program = new Program({ ...paths, FLAGS: flags }, { task: "start" });
  assertMatch(await program.opened(), new RegExp(`https://.*${file.db}`));
  await program.end();
});

test("the program says when everyone can come in", async () => {
  await using program = new Program({ HOST: "0.0.0.0" });
  await program.says(/open: http:\/\/localhost:(\d+)\/ .*127\.0\.0\.1[^]*CHAT_PASSWORD/);
});

test("where the platform says so, the chat is served on a Unix socket", async () => {
  await using file = await temporary();
  const path = `${file.folder}/chat.sock`;
  await using program = new Program({ DENO_SERVE_ADDRESS: `unix:${path}`, CHAT_MAX_CLIENTS_PER_ADDRESS: "1" });
  await program.says(/Chat is open.*\n/);
  const connect = () => Deno.connect({ transport: "unix", path });
  using page = await Raw.connect(await connect(), "GET / HTTP/1.1", "Host: chat.test");
  assertEquals(await page.status(), 200);
  using foreign = await Raw.connect(await connect(), ...HANDSHAKE, "Origin: http://evil.example");
  assertEquals(await foreign.status(), 403);
  using ada = await Raw.open(await connect(), "Origin: http://chat.test");
  using grace = await Raw.open(await connect());
  await ada.frame({ username: "Ada", message: "Hi" });
  for (const client of [ada, grace]) assertMatch(`${await client.next()}`, /"message":"Hi"/);
  assertEquals((await program.end()).code, 0);
});

test("while the room opens, a handshake is answered with 503, and the start fails with one line at most", async () => {
  using kv = await Deno.openKv(":memory:");
  const read = Promise.withResolvers<never>(), port = freePort(), printed: string[] = [];
  using _errors = muteErrors((text) => printed.push(text));
  const starting = start({ db: unreliable(kv, () => read.promise), port }).then(() => "", ({ message }) => message);
  const status = async () => {
    using raw = await Raw.connect(port, ...HANDSHAKE);
    return await raw.status();
  };
  await until(async () => await status().catch(() => 0) === 503)
    .finally(() => read.reject(new Error("disk I/O error")));
  assertEquals(await starting, "disk I/O error");
  assertEquals(printed, []);
});

test("a start that failed closes a database that opens later", async () => {
  await using chat = await start();
  const kv = await Deno.openKv(":memory:"), opening = Promise.withResolvers<Deno.Kv>(), { close } = kv;
  const { get: original } = Object.getOwnPropertyDescriptor(Deno, "openKv")!;
  Object.defineProperty(Deno, "openKv", { configurable: true, get: () => () => opening.promise });
  const error = await startChat({ port: chat.addr.port, db: "late" }).then(() => undefined, (error) => error);
  Object.defineProperty(Deno, "openKv", { configurable: true, get: original });
  assert(error instanceof Deno.errors.AddrInUse);
  let isClosed = false;
  patch(kv, "close", () => void (isClosed = true));
  opening.resolve(kv);
  await until(() => isClosed).finally(() => close.call(kv));
});

test("/healthz tells whether messages can be written", async () => {
  using kv = await Deno.openKv(":memory:");
  const read = Promise.withResolvers<void>(), port = freePort();
  let fails = false, lies = 0, blips = 0;
  const hangs: Promise<never>[] = [];
  const db = unreliable(kv, async (call, name) => {
    await read.promise;
    if (name === "get") await hangs[0];
    if (fails || name === "commit" && blips-- > 0) throw new Error("disk I/O error");
    const result = await call();
    if (name === "commit" && --lies === 0) throw new Error("connection lost");
    return result;
  });
  const health = async () => {
    const response = await fetch(`http://127.0.0.1:${port}/healthz`);
    return `${response.status} ${await response.text()}`;
  };
  using _quiet = muteErrors();
  const starting = start({ db, port });
  assertMatch(await until(() => health().catch(() => "")), /^503 .+\n$/);
  read.resolve();
  await using chat = await starting;
  assertEquals(await health(), "200 ok\n");
  await using ada = await Client.open(chat);
  fails = true;
  ada.send({ username: "Ada", message: "late" });
  await until(async () => /^503 .+\n$/.test(await health()));
  fails = false;
  await ada.has(is("receive_message"));
  await until(async () => await health() === "200 ok\n");
  // What fails once is tried again, and is no trouble yet.
  blips = 1;
  const heard = ada.has(({ message }) => message === "again");
  ada.send({ username: "Ada", message: "again" });
  await until(() => blips < 1);
  assertEquals(await health(), "200 ok\n");
  await heard;
  // A write is done but reported as failed, and nothing else is written.
  lies = 1;
  await ada.say("the last");
  await until(async () => await health() === "200 ok\n");
  // Nobody writes, and reading fails, or is not answered.
  const now = performance.now.bind(performance);
  let passed = 0; // ms
  using _clock = patch(performance, "now", () => now() + passed);
  const fallsIll = () => until(async () => (passed += 500) && /^503 .+\n$/.test(await health()));
  fails = true;
  await fallsIll();
  fails = false;
  await until(async () => await health() === "200 ok\n");
  hangs.push(new Promise(() => {}));
  await fallsIll();
});

test("a log that nobody can write or read does not concern the room", { ignore: NO_SHELL }, async () => {
  const say = async (shell: string, reads: boolean) => {
    const program = new Program({ PORT: `${freePort()}` }, { shell, reads });
    await program.serves();
    await using ada = await Client.open(program, { username: '"'.repeat(40) });
    await using grace = await Client.open(program);
    for (const text of numbered(1000)) await ada.say(text); // each makes a line of 130 bytes
    await grace.until(() => grace.messages().length === 1000);
    await ada.ask({ event: "ping" }, is("pong"));
    return program;
  };
  const [full, stuck] = await Promise.all([say('exec "$@" >/dev/full', true), say('exec "$@"', false)]);
  await using _full = full;
  await using _stuck = stuck;
  stuck.read();
  await stuck.says(/\d+ lines? .*(lost|dropped|left out|missing)/);
});

test("a log that failed for a while says what it lacks and goes on", async () => {
  let isFull = true, log = "";
  using _disk = patch(Deno.stdout, "write", (bytes) => {
    if (isFull) return Promise.reject(new Error("no space left on device"));
    log += decoder.decode(bytes);
    return Promise.resolve(bytes.length);
  });
  await using chat = await start({ log: true });
  await using ada = await Client.open(chat);
  for (const text of ["1", "2", "3"]) await ada.say(text);
  isFull = false;
  await ada.say("4");
  await until(() => /^3 lines were dropped\nMessage received: 4 from "Ada", 1 characters?\n$/.test(log));
});

// ───────────────────────────────────────────────────── The log ─────────────────────────────────────────────────────

/** Says numbered things until it is told to stop, as the page does: what is unconfirmed is sent again, in order. */
class Talker {
  /** What was said, and is confirmed. */
  readonly said: string[] = [];
  #talking = true;
  readonly #done: Promise<void>;

  constructor(chat: Place, readonly name: string, atOnce = 5) {
    this.#done = this.#talk(chat, atOnce);
    this.#done.catch(() => {}); // stop() tells
  }

  async #talk(chat: Place, atOnce: number): Promise<void> {
    while (this.#talking) {
      const first = this.said.length + 1;
      const batch = count(first, first + atOnce - 1).map((i) => ({
        message: `${this.name} ${i}`,
        id: `${this.name}-${i}`,
      }));
      while (true) {
        await using client = new Client(`ws://127.0.0.1:${chat.addr.port}/`);
        await client.until(() => client.closed || client.opened);
        if (client.opened) { for (const message of batch) client.send({ username: this.name, ...message }); }
        await client.until(() => client.closed || batch.every(({ id }) => client.events.some((e) => e.id === id)));
        if (!client.closed) break;
      }
      this.said.push(...batch.map(({ message }) => message));
    }
  }

  async stop(): Promise<string[]> {
    this.#talking = false;
    await this.#done;
    return this.said;
  }
}

/** Reads along, joining again from where it was as often as it is cut off. */
class Reader {
  readonly messages: Received[] = [];
  readonly #place: Place;
  readonly #change = new Change();
  #client?: Client;
  readonly #done: Promise<void>;
  #reading = true;

  constructor(place: Place) {
    this.#place = place;
    this.#done = this.#read();
    this.#done.catch(() => {}); // stop() tells
  }

  async #read(): Promise<void> {
    while (this.#reading) {
      const client = this.#client = new Client(`ws://127.0.0.1:${this.#place.addr.port}/`);
      await client.until(() => client.closed || client.opened);
      if (client.opened) client.send({ event: "join", username: "Reader", since: this.messages.length });
      let taken = 0, joined = false;
      await client.until(() => {
        for (const event of client.events.slice(taken)) {
          joined ||= event.event === "joined";
          if (joined && event.event === "receive_message") this.messages.push(event);
        }
        taken = client.events.length;
        this.#change.now();
        return client.closed;
      });
    }
  }

  /** Resolves when it has read so many messages. */
  has(count: number): Promise<boolean> {
    return until(() => this.messages.length >= count, this.#change.next, () => this.messages.length);
  }

  async stop(): Promise<Received[]> {
    this.#reading = false;
    await this.#client?.[Symbol.asyncDispose]();
    await this.#done;
    return this.messages;
  }
}

/** Asserts that each of these was said exactly once, each talker's in order, and that the numbers have no gap. */
function assertComplete(messages: Received[], said: string[][]): void {
  assertEquals(seqs(messages), count(1, messages.length));
  for (const lines of said) {
    const [name] = lines[0].split(" ");
    assertEquals(texts(messages).filter((text) => text.startsWith(`${name} `)), lines);
  }
  assertEquals(messages.length, said.flat().length);
}

/** Everything that the room has. */
async function everything(chat: Place): Promise<Received[]> {
  await using reader = await Client.open(chat, { since: 0 });
  const { seq, oldest } = reader.events.find(is("joined"))!;
  await reader.until(() => reader.messages().length > seq - oldest);
  return reader.messages();
}

/** A database whose every read and commit is left to `disturb`. */
function unreliable(kv: Deno.Kv, disturb: <T>(call: () => Promise<T>, name: string) => Promise<T>): Deno.Kv {
  const get = (_: Deno.Kv, name: keyof Deno.Kv) => {
    if (name === "get") return (key: Deno.KvKey) => disturb(() => kv.get(key), name);
    if (name !== "atomic") return (kv[name] as () => unknown).bind(kv);
    return () => {
      const operation = kv.atomic(), { commit } = operation;
      operation.commit = () => disturb(() => commit.call(operation), "commit");
      return operation;
    };
  };
  return new Proxy(kv, { get: get as ProxyHandler<Deno.Kv>["get"] });
}

/** A database that commits nothing until it works. */
function held(kv: Deno.Kv): { db: Deno.Kv; works: PromiseWithResolvers<void> } {
  const works = Promise.withResolvers<void>();
  const db = unreliable(kv, async (call, name) => {
    if (name === "commit") await works.promise;
    return await call();
  });
  return { db, works };
}

test("a database that once seems to be empty, and then breaks off, is not written over", async () => {
  using kv = await Deno.openKv(":memory:");
  let lies = 0, breaks = 0;
  const db = unreliable(kv, async <T>(call: () => Promise<T>, name: string) => {
    const isLie = name === "get" && lies-- > 0;
    return isLie ? { key: [], value: null, versionstamp: null } as T : await call();
  });
  const { list } = kv;
  using _broken = patch(
    kv,
    "list",
    (async function* (...args: Parameters<typeof list>) {
      let read = 0;
      for await (const entry of list.apply(kv, args)) {
        if (read++ === 2 && breaks-- > 0) throw new Error("disk I/O error");
        yield entry;
      }
    }) as unknown as typeof list,
  );
  await using chat = await start({ db });
  await using ada = await Client.open(chat, { username: "Ada" });
  for (const message of numbered(5)) await ada.say(message);
  [lies, breaks] = [2, 1]; // for the look, and for what follows
  await until(() => breaks < 1);
  await using grace = await Client.open(chat, { username: "Grace" });
  assertEquals((await grace.say("one more")).seq, 6);
  assertEquals(texts(await everything(chat)), [...numbered(5), "one more"]);
});

test("a server that is killed again and again loses nothing and doubles nothing", async () => {
  await using file = await temporary();
  const env = { CHAT_DB: file.db, PORT: `${freePort()}` };
  let program = await Program.start(env);
  const { addr } = program;
  const talkers = ["Ada", "Grace", "Lin"].map((name) => new Talker({ addr }, name));
  const reader = new Reader({ addr });
  for (let kill = 0; kill < 5; kill++) {
    await reader.has(reader.messages.length + 100);
    await program.end("SIGKILL");
    program = await Program.start(env);
  }
  const said = await Promise.all(talkers.map((talker) => talker.stop()));
  const messages = await everything({ addr });
  assertComplete(messages, said);
  await reader.has(messages.length);
  assertEquals(await reader.stop(), messages);
  await program.end();
});

test("a message that is sent again is not doubled: here, after a restart, or through another instance", async () => {
  await using file = await temporary();
  const message = { event: "send_message", username: "Ada", message: "once", id: "the-one" };
  const confirmed = (event: Received) => event.id === "the-one";
  let first: Received;
  {
    await using chat = await start(file);
    await using ada = await Client.open(chat);
    ada.send(message);
    first = await ada.ask(message, confirmed);
    await using grace = await Client.open(chat);
    await using bystander = await Client.open(chat);
    assertEquals(await grace.ask(message, confirmed), first);
    await grace.say("next");
    await bystander.until(() => bystander.events.length > 0);
    assertEquals(seqs(bystander.events), [2]);
  }
  await using chat = await start(file);
  await using other = await start(file);
  for (const instance of [chat, other]) {
    await using ada = await Client.open(instance, { username: "Ada", since: 1 });
    assertEquals(await ada.ask(message, confirmed), first);
  }
  await using lin = await Client.open(other);
  const again = { ...message, id: "another", message: "through both" };
  await using ada = await Client.open(chat);
  const [a, b] = await Promise.all([ada, lin].map((client) => client.ask(again, ({ id }) => id === "another")));
  assertEquals(a, b);
  assertEquals(texts(await everything(other)), ["once", "next", "through both"]);
});

test("who says what someone else says on another instance at the same moment is heard, too", async () => {
  using kv = await Deno.openKv(":memory:");
  await using other = await start({ db: kv });
  await using grace = await Client.open(other, { username: "Guest" });
  const same = { username: "Guest", message: "Hi" };
  let isFirst = true;
  const db = unreliable(kv, async (call, name) => {
    if (name !== "commit" || !isFirst) return await call();
    isFirst = false;
    grace.send(same);
    await grace.has(is("receive_message"));
    await grace.say("and more");
    throw new Error("database is locked");
  });
  await using chat = await start({ db });
  await using ada = await Client.open(chat, { username: "Guest" });
  const now = Date.now();
  using _clock = patch(Date, "now", () => now);
  ada.send(same);
  await ada.until(() => ada.messages().length === 3);
  assertEquals(texts(await everything(chat)), ["Hi", "and more", "Hi"]);
});

test("joins that ask for what is to come do not keep a slow database from being written", async () => {
  using kv = await Deno.openKv(":memory:");
  const db = unreliable(kv, async (call, name) => {
    if (name === "get") await new Promise((resolve) => setTimeout(resolve, 200)); // as if it were far away
    return await call();
  });
  await using chat = await start({ db });
  await using ada = await Client.open(chat);
  let isOver = false, joins = 0;
  const joining = count(1, 30).map(async (number) => {
    await using client = await Client.open(chat);
    await new Promise((resolve) => setTimeout(resolve, 30 * number)); // so that one comes during each read
    for (; !isOver; joins++) await client.ask({ event: "join", since: 1_000_000 }, is("joined"));
  });
  await until(() => joins > 30);
  await ada.say("Hi").finally(() => isOver = true);
  await Promise.all(joining);
});

test("a message that is sent again while the log is read is not doubled, however short the history", async () => {
  using kv = await Deno.openKv(":memory:");
  const [fast, late] = [held(kv), held(kv)];
  const read = Promise.withResolvers<void>(), goOn = Promise.withResolvers<void>();
  const list: Deno.Kv["list"] = (...args) =>
    (async function* () {
      yield* kv.list(...args);
      if (JSON.stringify(args).includes("log") && (await kv.get(["chat", "log", 1])).value) {
        read.resolve();
        await goOn.promise;
      }
    })() as unknown as Deno.KvListIterator<never>;
  const slow = new Proxy(late.db, { get: (target, name) => name === "list" ? list : Reflect.get(target, name) });
  await using one = await start({ db: fast.db, history: 2 });
  await using two = await start({ db: slow, history: 2 });
  await using ada = await Client.open(one);
  await using grace = await Client.open(two);
  const twice = { username: "Grace", message: "twice", id: "twice" };
  grace.send(twice);
  ada.send(twice);
  for (const message of numbered(5)) ada.send({ username: "Ada", message });
  await Promise.all([ada, grace].map((client) => client.ask({ event: "ping" }, is("pong"))));
  fast.works.resolve();
  await ada.until(() => ada.messages().length === 6);
  late.works.resolve(); // what waits to be written there is in the log by now, and no longer kept
  await read.promise;
  grace.send(twice);
  await grace.ask({ event: "ping" }, is("pong"));
  goOn.resolve();
  await ada.until(() => texts(ada.messages()).lastIndexOf("twice") > 5);
  await ada.say("the end");
  assertEquals(texts(ada.messages()), ["twice", ...numbered(5), "twice", "the end"]);
});

test("joining at any point of a running stream misses nothing and repeats nothing", async () => {
  await using chat = await start();
  const talkers = ["Ada", "Grace"].map((name) => new Talker(chat, name, 20));
  await using watcher = await Client.open(chat, { since: 0 });
  const joined: Client[] = [];
  for (let i = 0; i < 60; i++) {
    await watcher.until(() => watcher.messages().length > i * 20);
    joined.push(await Client.open(chat, { username: `reader ${i}`, since: Math.floor(i / 2) * 10 }));
  }
  const said = await Promise.all(talkers.map((talker) => talker.stop()));
  const last = said.flat().length;
  for (const [i, reader] of joined.entries()) {
    await reader.until(() => reader.messages().at(-1)?.seq === last);
    assertEquals(seqs(reader.messages()), count(Math.floor(i / 2) * 10 + 1, last));
    await reader[Symbol.asyncDispose]();
  }
});

test("a database that fails for a while loses nothing", async () => {
  using kv = await Deno.openKv(":memory:");
  using _quiet = muteErrors();
  let commits = 0;
  const db = unreliable(kv, (call, name) => {
    // The fifth failure in a row is the first that is reported.
    if (name === "commit" && ++commits <= 6) return Promise.reject(commits === 5 ? undefined : new Error("locked"));
    return call();
  });
  await using chat = await start({ db });
  await using ada = await Client.open(chat);
  await ada.say(...numbered(100));
  assertEquals(texts(ada.messages()), numbered(100));
  assert(commits > 6);
});

test("a write that was done but reported as failed is not done again", async () => {
  using kv = await Deno.openKv(":memory:");
  let commits = 0;
  const db = unreliable(kv, async (call, name) => {
    const result = await call();
    if (name === "commit" && ++commits <= 2) throw new Error("connection lost");
    return result;
  });
  await using chat = await start({ db });
  await using ada = await Client.open(chat);
  for (const message of numbered(100)) ada.send({ username: "Ada", message }); // without ids to know them by
  await ada.until(() => ada.messages().at(-1)?.message === "message 100");
  assertEquals(texts(ada.messages()), numbered(100));
});

test("a write that was reported as failed is not done again, even if it was deleted since", async () => {
  using kv = await Deno.openKv(":memory:");
  await using other = await start({ db: kv, history: 5 });
  await using grace = await Client.open(other, { username: "Grace" });
  let isFirst = true;
  const db = unreliable(kv, async (call, name) => {
    const result = await call();
    if (name !== "commit" || !isFirst) return result;
    isFirst = false;
    await grace.has(is("receive_message"));
    for (const message of numbered(20)) await grace.say(message);
    throw new Error("connection lost");
  });
  await using chat = await start({ db, history: 5 });
  await using ada = await Client.open(chat);
  ada.send({ username: "Ada", message: "once" }); // without an id to know it by
  await ada.ended(); // what came meanwhile is not kept any more
  await using again = await Client.open(chat);
  await again.say("next");
  await grace.has(({ message }) => message === "next");
  assertEquals(texts(grace.messages()), ["once", ...numbered(20), "next"]);
});

test("what waits for a database that fails is bounded, and its sender keeps it", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db });
  await using ada = await Client.open(chat);
  const message = "x".repeat(2000);
  for (const i of count(1, 9000)) ada.send({ username: "Ada", message, id: `${i}` });
  const refused = () => ada.events.filter(is("error"));
  await ada.has(is("error"));
  works.resolve();
  await ada.until(() => ada.events.length === 9000);
  const { id, error, retry_after } = refused()[0];
  assertMatch(error, /try again/);
  assertEquals(retry_after, 1000);
  assertEquals((await ada.ask({ username: "Ada", message, id }, (event) => event.id === id)).message, message);
});

test("who says much waits for the others, and gives way to them where there is no room", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db });
  await using ada = await Client.open(chat);
  await using grace = await Client.open(chat);
  for (const i of count(1, 8500)) ada.send({ username: "Ada", message: `${i}`, id: `${i}` });
  await ada.ask({ event: "ping" }, is("pong"));
  const excess = ada.events.filter(is("error")).length;
  assert(excess > 0);
  for (const message of ["one", "two"]) grace.send({ username: "Grace", message, id: message });
  await grace.ask({ event: "ping" }, is("pong"));
  works.resolve();
  await ada.until(() => ada.events.filter(({ id }) => id).length >= 8502);
  const by = (name: string) => ada.events.filter(({ username }) => username === name);
  const [first, last] = [by("Ada")[0].seq, by("Ada").at(-1)!.seq];
  assertEquals(texts(by("Grace")), ["one", "two"]);
  for (const { seq } of by("Grace")) assert(seq < (first + last) / 2, `${seq}`);
  assertEquals(texts(by("Ada")), texts(by("Ada")).toSorted((a, b) => +a - +b));
});

test("what is said after coming back comes after what was sent again", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db });
  const said = numbered(20).map((message, id) => ({ username: "Ada", message, id: `${id}` }));
  {
    await using ada = await Client.open(chat);
    for (const message of said.slice(0, 10)) ada.send(message);
    await ada.ask({ event: "ping" }, is("pong"));
  }
  await using ada = await Client.open(chat);
  for (const message of said) ada.send(message);
  await ada.ask({ event: "ping" }, is("pong"));
  works.resolve();
  await ada.until(() => ada.messages().length === 20);
  assertEquals(texts(ada.messages()), numbered(20));
});

test("a long message does not wait for ten short ones of everyone", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db });
  const talkers = await Promise.all(count(1, 20).map(() => Client.open(chat)));
  await using grace = await Client.open(chat);
  for (const client of talkers) for (const message of numbered(10)) client.send({ username: "Ada", message });
  for (const client of talkers) await client.ask({ event: "ping" }, is("pong"));
  for (const message of numbered(2, "x".repeat(1900))) grace.send({ username: "Grace", message });
  await grace.ask({ event: "ping" }, is("pong"));
  works.resolve();
  await grace.until(() => grace.messages().length === 202);
  const before = grace.messages().findLastIndex(({ username }) => username === "Grace");
  assert(before < 150, `${before} messages came before`);
  for (const client of talkers) await client[Symbol.asyncDispose]();
});

test("a short message does not wait for as many long ones", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db });
  const flooders = await Promise.all(count(1, 20).map(() => Client.open(chat)));
  await using grace = await Client.open(chat);
  for (const [i, client] of flooders.entries()) {
    client.username = `${i}`;
    for (const text of numbered(10, "x".repeat(1900))) client.send({ username: client.username, message: text });
    await client.ask({ event: "ping" }, is("pong"));
  }
  for (const message of numbered(10)) grace.send({ username: "Grace", message });
  await grace.ask({ event: "ping" }, is("pong"));
  works.resolve();
  await grace.until(() => grace.messages().length === 210);
  const last = grace.messages().findLastIndex(({ username }) => username === "Grace");
  assert(last < 120, `${last} messages came before`); // those that were written already, and four of each
  for (const client of flooders) await client[Symbol.asyncDispose]();
});

test("who said nothing lately is ahead of what others say, also with a long message", async () => {
  using kv = await Deno.openKv(":memory:");
  const hold = Promise.withResolvers<void>();
  let isHeld = false, isWaiting = false;
  const db = unreliable(kv, async (call, name) => {
    if (name === "commit" && isHeld) await (isWaiting = true, hold.promise);
    return await call();
  });
  await using chat = await start({ db });
  const crowd = await Promise.all(count(1, 20).map(() => Client.open(chat)));
  await using grace = await Client.open(chat);
  await grace.say("before");
  await crowd[0].say(...numbered(100));
  isHeld = true;
  crowd[0].send({ username: "Ada", message: "held" });
  await until(() => isWaiting);
  for (const client of crowd) for (const message of numbered(10)) client.send({ username: "Ada", message });
  await Promise.all(crowd.map((client) => client.ask({ event: "ping" }, is("pong"))));
  const said = grace.say("x".repeat(2000));
  await grace.ask({ event: "ping" }, is("pong"));
  hold.resolve();
  const { seq } = await said;
  assert(seq! <= 102 + 20 + 1, `${seq! - 102} messages came before`); // what was held, and the first of each
  for (const client of crowd) await client[Symbol.asyncDispose]();
});

test("who goes is gone at once, whatever it still waits for", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db });
  await using ada = await Client.open(chat, { username: "Ada" });
  ada.send({ username: "Ada", message: "is not written yet" });
  const eve = await Client.open(chat, { username: "Eve" });
  for (let i = 0; i < 100; i++) eve.send({ event: "join", since: 1_000_000 }); // each may wait a second
  await ada.has(({ online }) => online === 2);
  const leaving = ada.next(({ online }) => online === 1);
  await eve[Symbol.asyncDispose]();
  await leaving;
  works.resolve();
});

test("a join that waits for the database does not keep what is sent after it waiting", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db });
  await using ada = await Client.open(chat, { username: "Ada" });
  ada.send({ username: "Ada", message: "is not written yet" });
  for (let i = 0; i < 100; i++) ada.send({ event: "join", since: 1_000_000 });
  await ada.ask({ event: "ping" }, is("pong"));
  works.resolve();
});

test("a join that asks for what is to come waits for one look at the database, not until nobody writes", async () => {
  using kv = await Deno.openKv(":memory:");
  const waiting: (() => void)[] = [];
  let isHeld = true, isIn = false;
  const db = unreliable(kv, async (call, name) => {
    if (isHeld && name === "commit") await new Promise<void>((resolve) => waiting.push(resolve));
    return await call();
  });
  await using chat = await start({ db });
  await using ada = await Client.open(chat, { username: "Ada" });
  await using eve = await Client.open(chat);
  const { setTimeout } = globalThis; // a join that has waited for a second is answered anyway
  using _endless = patch(
    globalThis,
    "setTimeout",
    ((work: () => void, ms: number) => {
      if (ms !== 1000) return setTimeout(work, ms);
    }) as typeof setTimeout,
  );
  ada.send({ username: "Ada", message: "first" });
  await until(() => waiting.length > 0);
  const joined = eve.ask({ event: "join", since: 1_000_000 }, is("joined")).then(() => isIn = true);
  for (let i = 0; i < 50 && !isIn; i++) {
    ada.send({ username: "Ada", message: "next" });
    await ada.ask({ event: "ping" }, is("pong")); // now it is queued
    waiting.shift()!();
    await until(() => waiting.length > 0);
  }
  assert(isIn, "50 commits were not enough");
  isHeld = false;
  waiting.shift()!();
  await joined;
});

test("who sends again through another connection is answered there", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db });
  await using ada = await Client.open(chat);
  for (const i of count(1, 8000)) ada.send({ username: "Ada", message: `${i}`, id: `${i}` });
  await ada.ask({ event: "ping" }, is("pong"));
  await ada[Symbol.asyncDispose]();
  await using again = await Client.open(chat);
  again.send({ username: "Ada", message: "8000", id: "8000" });
  await again.ask({ event: "ping" }, is("pong"));
  await using grace = await Client.open(chat);
  grace.send({ username: "Grace", message: "for which there is no room" });
  const { id, retry_after } = await again.has(is("error"));
  assertEquals([id, retry_after], ["8000", 1000]);
  works.resolve();
  await again.has(({ username }) => username === "Grace");
  await again.ask({ username: "Ada", message: "8000", id }, ({ id }) => id === "8000");
});

test("a shutdown does not wait for a database that hangs, nor for a peer that does not read", async () => {
  using kv = await Deno.openKv(":memory:");
  const db = unreliable(kv, (call, name) => name === "commit" ? new Promise(() => {}) : call());
  const chat = await start({ db });
  using lazy = await Raw.open(chat.addr.port);
  await lazy.frame({ event: "join", username: "Lazy" });
  const ada = await Client.open(chat, { username: "Ada" });
  ada.send({ username: "Ada", message: "never written" });
  await ada.has(is("presence"));
  const begun = performance.now();
  await chat.shutdown();
  assert(performance.now() - begun < 2000);
  assertEquals((await ada.ended()).code, 1001);
});

test("the port is free once a shutdown has ended, whoever is connected", async () => {
  const port = freePort();
  for (const lines of [[], ["GET / HTTP/1.1"], HANDSHAKE, ["GET / HTTP/1.1", "Host: chat.test"]]) {
    const chat = await start({ port });
    using raw = await Raw.connect(port, ...lines);
    if (lines.length > 1) await raw.status();
    await chat.shutdown();
  }
});

test("the program ends within two seconds while another process holds the database", async () => {
  await using file = await temporary();
  await using program = await Program.start({ CHAT_DB: file.db });
  await using ada = await Client.open(program, { username: "Ada" });
  await ada.say("before");
  using lock = new DatabaseSync(file.db, { timeout: DEADLINE });
  lock.exec("BEGIN EXCLUSIVE");
  ada.send({ username: "Ada", message: "meanwhile" });
  await new Promise((resolve) => setTimeout(resolve, 1500)); // so that more than this message waits for the lock
  const begun = performance.now();
  await program.end();
  const took = performance.now() - begun;
  assert(took < 2500, `${took} ms`);
});

test("a log that cannot be read stops the start with a line that names the key, and stays", async () => {
  const damages: [RegExp, (kv: Deno.Kv) => Promise<unknown>][] = [
    [/"?chat"?,\s*"?log"?,\s*1\b/, (kv) => kv.set(["chat", "log", 1], new Uint8Array([0, 255]))],
    [/"?chat"?,\s*"?log"?,\s*1\b/, (kv) => kv.set(["chat", "log", 1], "a text")],
    [/layout/, (kv) => kv.set(["chat", "head"], { layout: 99, last: 1 })],
  ];
  await Promise.all(damages.map(async ([line, damage]) => {
    await using file = await temporary();
    {
      await using chat = await start(file);
      await using ada = await Client.open(chat);
      await ada.say("Hi");
    }
    using kv = await Deno.openKv(file.db);
    await damage(kv);
    const content = async () => (await Array.fromAsync(kv.list({ prefix: [] }))).map((entry) => Deno.inspect(entry));
    const before = await content();
    await using program = new Program({ CHAT_DB: file.db });
    assertEquals((await program.ended()).code, 1);
    assertMatch(program.output, /^.*\n$/);
    assertMatch(program.output, line);
    assertEquals(await content(), before);
  }));
});

test("once the entry that cannot be read is deleted, the room goes on after it", async () => {
  for (const [damaged, kept] of [[2, ["3"]], [3, []]] as [number, string[]][]) {
    await using file = await temporary();
    {
      await using chat = await start(file);
      await using ada = await Client.open(chat);
      for (const text of ["1", "2", "3"]) await ada.say(text);
    }
    using kv = await Deno.openKv(file.db);
    await kv.set(["chat", "log", damaged], "a text");
    assertMatch(await start(file).then(() => "it started", String), /delete that entry/);
    await kv.delete(["chat", "log", damaged]);
    for (const messages of [kept, [...kept, "4"]]) {
      await using chat = await start(file);
      assertEquals(texts(await everything(chat)), messages);
      await using ada = await Client.open(chat);
      if (messages === kept) assertEquals((await ada.say("4")).seq, 4);
    }
  }
});

test("what the entries hold is the log, whatever the head says", async () => {
  await using file = await temporary();
  using kv = await Deno.openKv(file.db);
  const said: string[] = [];
  for (const head of [undefined, { layout: 1, last: 2 }, undefined]) {
    await using chat = await start(file);
    assertEquals(texts(await everything(chat)), said);
    const speak = async () => {
      await using ada = await Client.open(chat);
      for (const _ of count(1, 3)) assertEquals((await ada.say(`${said.push(`${said.length + 1}`)}`)).seq, said.length);
    };
    await speak();
    await using reader = await Client.open(chat);
    await (head ? kv.set(["chat", "head"], head) : kv.delete(["chat", "head"]));
    assertEquals((await reader.ended()).code, 1013); // it goes on where it was
    await speak();
    assertEquals(texts(await everything(chat)), said);
    await chat.shutdown();
    await kv.delete(["chat", "head"]);
  }
});

test("what is no longer kept is deleted, also what an earlier start had kept", async () => {
  await using file = await temporary();
  for (const history of [100, 5]) {
    await using chat = await start({ ...file, history });
    await using ada = await Client.open(chat);
    for (const text of numbered(40)) await ada.say(text);
  }
  using kv = await Deno.openKv(file.db);
  const entries = await Array.fromAsync(kv.list({ prefix: ["chat", "log"] }));
  assert(entries.length <= 6, `${entries.length} entries`);
  await using chat = await start({ ...file, history: 5 });
  assertEquals(texts(await everything(chat)).slice(-5), numbered(40).slice(-5));
});

test("what is no longer kept is deleted, also where several instances write", async () => {
  await using file = await temporary();
  {
    await using chat = await start(file);
    await using ada = await Client.open(chat);
    for (const text of numbered(700)) await ada.say(text); // more entries than one commit deletes
  }
  await using one = await start({ ...file, history: 5 });
  await using two = await start({ ...file, history: 5 });
  await using ada = await Client.open(one);
  await using grace = await Client.open(two);
  using kv = await Deno.openKv(file.db);
  const kept = async () => (await Array.fromAsync(kv.list({ prefix: ["chat", "log"] }))).length;
  await until(async () => {
    await ada.say("by one");
    await grace.say("by two");
    return await kept() <= 6;
  });
});

/** A database that keeps back what it answers when asked for the head: from the answer on that is so many changes on. */
function slowHead(kv: Deno.Kv, changes: number): { db: Deno.Kv; asked: () => Promise<boolean>; answer: () => void } {
  const { promise, resolve } = Promise.withResolvers<void>(), first = kv.get(["chat", "head"]);
  let isHeld = false;
  const db = unreliable(kv, async (call, name) => {
    const result = await call();
    if (name !== "get") return result;
    const { versionstamp } = result as Deno.KvEntryMaybe<unknown>;
    if (versionstamp !== (await first).versionstamp) changes--;
    if (changes < 0) await (isHeld = true, promise);
    return result;
  });
  return { db, asked: () => until(() => isHeld), answer: resolve };
}

test("a start is not disturbed by what others write, and so delete, meanwhile", async () => {
  using kv = await Deno.openKv(":memory:");
  await using other = await start({ db: kv, history: 1 });
  await using ada = await Client.open(other);
  await ada.say("1");
  const { db, asked, answer } = slowHead(kv, -1); // the very first answer
  const starting = start({ db, history: 1 });
  starting.catch(() => {});
  await asked();
  for (const text of ["2", "3", "4"]) await ada.say(text);
  answer();
  await using chat = await starting;
  assertEquals(texts(await everything(chat)), ["4"]);
});

test("the room leaves other keys of its database alone", async () => {
  using kv = await Deno.openKv(":memory:");
  const own = [["head"], ["here", "me", 0], ["log", 1]];
  for (const key of own) await kv.set(key, "mine");
  {
    await using chat = await start({ db: kv, history: 1 });
    await using ada = await Client.open(chat, { username: "Ada" });
    await ada.say("1", "2");
    assertEquals((await ada.say("3")).seq, 3);
  }
  const others = [];
  for await (const { key, value } of kv.list({ prefix: [] })) {
    if (key[0] !== "chat") others.push([...key, value]);
  }
  assertEquals(others, own.map((key) => [...key, "mine"]));
});

// ────────────────────────────────────────────────── Who reads how ──────────────────────────────────────────────────

/** Lets someone join and not read, while another says 10 MB. */
async function outpace(chat: Place): Promise<[Raw, Client]> {
  const lazy = await Raw.open(chat.addr.port);
  await lazy.frame({ event: "join", username: "Lazy", since: 0 });
  const ada = await Client.open(chat, { username: "Ada" });
  await ada.has(({ users }) => users?.includes("Lazy"));
  const padding = "x".repeat(1900);
  for (let i = 0; i < 10; i++) await ada.say(...numbered(500, padding));
  return [lazy, ada];
}

test("a reader that pauses is given no more than it takes, and then goes on where it was", async () => {
  await using chat = await start();
  const [paused, talking] = await outpace(chat);
  using lazy = paused;
  await using ada = talking;
  await ada.ask({ event: "history", before: 2 }, is("history"));
  assert(!ada.events.some(({ left }) => left?.includes("Lazy")));
  const taken: Received[] = [];
  while (taken.length < 5000) {
    const frame = await lazy.next();
    assert(typeof frame === "string", `closed with ${frame} after ${taken.length}`);
    taken.push(...frame.split("\n").map((line) => JSON.parse(line)).filter(is("receive_message")));
  }
  assertEquals(seqs(taken), count(1, 5000));
  await ada.say("live again");
  assertMatch(`${await lazy.next()}`, /"seq":5001,/);
});

test("who comes back after long, and has to wait for its turn, begins with the oldest message kept by then", async () => {
  await using chat = await start({ history: 300, rateLimit: 0 });
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.say(...count(1, 400).map(() => "\u20ac".repeat(2000)));
  using late = await Raw.open(chat.addr.port);
  await late.frame({ event: "join", since: 400 });
  for (let i = 0; i < 60; i++) await late.frame({ event: "history", before: 401 }); // more than it is sent unread
  await late.frame({ event: "join", username: "Late", since: 1 });
  await ada.until(() => ada.events.some(({ joined, users }) => (users ?? joined)?.includes("Late")));
  await ada.say(...numbered(100));
  const taken: number[] = [];
  while (taken.at(-1) !== 500) {
    const frame = await late.next();
    assert(typeof frame === "string", `closed with ${frame} after ${taken.at(-1)}`);
    taken.push(...seqs(frame.split("\n").map((line) => JSON.parse(line)).filter(is("receive_message"))));
  }
  assertEquals(taken, count(201, 500));
});

test("readers that catch up take turns", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  for (let i = 0; i < 6; i++) await ada.say(...numbered(500, "x".repeat(1900)));
  const send = WebSocket.prototype.send, turns: { to: WebSocket; bytes: number }[] = [];
  using _watched = patch(WebSocket.prototype, "send", function (this: WebSocket, frame) {
    if (`${frame}`.includes('"receive_message"')) {
      if (turns.at(-1)?.to !== this) turns.push({ to: this, bytes: 0 });
      turns.at(-1)!.bytes += `${frame}`.length;
    }
    return send.call(this, frame);
  });
  await Promise.all(
    count(1, 3).map(async () => {
      using raw = await Raw.open(chat.addr.port);
      await raw.frame({ event: "join", since: 0 });
      let frame;
      while (typeof (frame = await raw.next()) === "string" && !frame.includes('"seq":3000,'));
      assert(frame);
    }),
  );
  const longest = Math.max(...turns.map(({ bytes }) => bytes));
  assert(longest < 512 * 1024, `${longest} bytes in a row`);
});

test("no more is said than those who get a frame for each message can be sent", async () => {
  await using chat = await start();
  const plain = await Promise.all(count(1, 40).map(() => Client.open(chat)));
  const talkers = await Promise.all(count(1, 20).map((i) => Client.open(chat, { username: `${i}` })));
  await talkers[0].say("the first");
  const places = new Map<WebSocket, number>(), { send } = WebSocket.prototype;
  let furthest = 0;
  using _watched = patch(WebSocket.prototype, "send", function (this: WebSocket, frame) {
    const [, seq] = /^{"event":"receive_message","seq":(\d+).*}$/.exec(`${frame}`) ?? [];
    if (seq) places.set(this, +seq);
    if (places.size >= 40) furthest = Math.max(furthest, Math.max(...places.values()) - Math.min(...places.values()));
    return send.call(this, frame);
  });
  await Promise.all(talkers.map((talker) => talker.say(...numbered(100))));
  for (const client of plain) {
    await client.until(() => client.frames.length === 2001);
    assertEquals(seqs(client.events), count(1, 2001));
  }
  assert(furthest < 500, `one was ${furthest} messages ahead of another`);
  for (const client of [...plain, ...talkers]) await client[Symbol.asyncDispose]();
});

test("a plain client gets all that is written together, however short the history", async () => {
  await using chat = await start({ history: 2 });
  const plain = await Promise.all(count(1, 50).map(() => Client.open(chat)));
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.say(...numbered(50));
  await ada.say(...count(1, 100).map(() => "x".repeat(2000)));
  for (const client of plain) {
    await client.until(() => client.closed || client.messages().length === 150);
    assertEquals(client.frames.length, 150);
    assertEquals(texts(client.events).slice(0, 50), numbered(50));
    await client[Symbol.asyncDispose]();
  }
});

test("while much waits, who has just come is told to try again, and nobody else is", async () => {
  using kv = await Deno.openKv(":memory:");
  const { db, works } = held(kv);
  await using chat = await start({ db, rateLimit: 1000 });
  await using ada = await Client.open(chat, { username: "Ada" });
  using _later = later(1000);
  for (const message of numbered(300)) ada.send({ username: "Ada", message });
  await ada.ask({ event: "ping" }, is("pong"));
  await using grace = await Client.open(chat, { username: "Grace" });
  const hers = { username: "Grace", message: "Hi", id: "hers" };
  const { id, retry_after } = await grace.ask(hers, is("error"));
  assertEquals([id, retry_after], ["hers", 1000]);
  const said = ada.say("the last");
  await ada.ask({ event: "ping" }, is("pong"));
  using _stillLater = later(1000);
  grace.send(hers);
  await grace.ask({ event: "ping" }, is("pong"));
  works.resolve();
  await said;
  await ada.has(({ message }) => message === "Hi");
  assertEquals(texts(ada.messages()).filter((text) => text === "Hi").length, 1);
  assertEquals(ada.events.filter(is("error")), []);
});

test("a reader that takes nothing for 30 seconds is closed, and finds everything when it joins again", async () => {
  await using chat = await start();
  const [lazy, talking] = await outpace(chat);
  await using ada = talking;
  using _later = later(31_000);
  await ada.has(({ left }) => left?.includes("Lazy"));
  const { events, code } = await lazy.drain();
  assertEquals(code, 1013);
  const seen = events.filter(is("receive_message"));
  assertEquals(seqs(seen), count(1, seen.length));
  await using back = await Client.open(chat, { username: "Lazy", since: seen.length });
  await back.until(() => back.messages().at(-1)?.seq === 5000);
  assertEquals(seqs(back.messages()), count(seen.length + 1, 5000));
});

/** Lets the first frame that the server sends and that has this in it fail. What it says of that is returned. */
function breakSending(what: string): Disposable & { said: string[] } {
  const said: string[] = [], { send } = WebSocket.prototype;
  let isBroken = false;
  const sending = patch(WebSocket.prototype, "send", function (this: WebSocket, data) {
    if (isBroken || typeof data !== "string" || !data.includes(what)) return send.call(this, data);
    isBroken = true;
    throw new Error("broken on purpose");
  });
  const saying = muteErrors((text) => said.push(text));
  return { said, [Symbol.dispose]: () => [sending, saying].forEach((patched) => patched[Symbol.dispose]()) };
}

test("a mistake while sending is told once, and nobody misses anything for it", async () => {
  await using chat = await start();
  const readers = [new Reader(chat), new Reader(chat), new Reader(chat)];
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.has(({ users, joined }) => (users ?? joined)?.includes("Reader"));
  using broken = breakSending('"receive_message"');
  for (const text of ["1", "2", "3"]) ada.send({ username: "Ada", message: text });
  for (const reader of readers) await reader.has(3);
  await using grace = await Client.open(chat);
  await grace.say("4");
  for (const reader of readers) await reader.has(4);
  assertMatch(broken.said.join(""), /^[^]*broken on purpose(?![^]*broken)[^]*\n\s+at .*main\.ts/);
  for (const reader of readers) assertEquals(seqs(await reader.stop()), count(1, 4));
});

test("what one connection sends keeps its order, also around its joins", async () => {
  await using chat = await start();
  await using reader = await Client.open(chat);
  const raws = await Promise.all(count(1, 20).map(() => Raw.open(chat.addr.port)));
  const [masked, nothing] = [0x80, 0];
  const frame = (event: object) => {
    const body = encoder.encode(JSON.stringify(event));
    return [0x81, masked | body.length, nothing, nothing, nothing, nothing, ...body];
  };
  const lines = raws.map((_, i) => numbered(40, `${i}`));
  await Promise.all(raws.map((raw, i) => {
    const said = lines[i].map((message) => frame({ username: `${i}`, message }));
    for (const at of [30, 20, 10, 0]) said.splice(at, 0, frame({ event: "join", key: "k".repeat(20), since: 1e6 }));
    return raw.bytes(new Uint8Array(said.flat()));
  }));
  await reader.until(() => reader.events.length === 800);
  for (const said of lines) assertEquals(texts(reader.events).filter((text) => said.includes(text)), said);
  for (const raw of raws) raw[Symbol.dispose]();
});

test("a mistake in the news is told once, and news go on after it", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.has(is("presence"));
  using broken = breakSending('"presence"');
  await using grace = await Client.open(chat, { username: "Grace" });
  await until(() => broken.said.length > 0);
  await using lin = await Client.open(chat, { username: "Lin" });
  await lin.has(is("presence"));
  await using hal = await Client.open(chat, { username: "Hal" });
  await hal.until(() => [grace, lin].every(({ events, closed }) => closed || events.some(is("presence"))));
  await lin.has(({ joined }) => joined?.includes("Hal"));
  assertEquals(broken.said.join("").split("broken on purpose").length, 2);
});

// ───────────────────────────────────────────────── Several instances ─────────────────────────────────────────────────

/** How long it takes until what one says is heard by another who is elsewhere: the median of a few. */
async function delay(here: Client, there: Client): Promise<number> {
  const delays: number[] = [];
  for (const text of numbered(9, crypto.randomUUID())) {
    const begun = performance.now(), heard = there.has(({ message }) => message === text);
    await Promise.all([here.say(text), heard]);
    delays.push(performance.now() - begun);
  }
  return delays.sort((a, b) => a - b)[4];
}

test("two instances on one database are one room", async () => {
  await using file = await temporary();
  await using one = await start(file);
  await using two = await start(file);
  await using ada = await Client.open(one, { username: "Ada" });
  await using grace = await Client.open(two, { username: "Grace" });
  for (const client of [ada, grace]) {
    await client.until(() => client.events.findLast(is("presence"))?.online === 2);
  }
  const told = await delay(ada, grace);
  assert(told < 250, `${told} ms`); // 50 on a quiet machine
  const talkers = [new Talker(one, "one"), new Talker(two, "two")];
  for (const client of [ada, grace]) await client.until(() => client.messages().length > 500);
  const said = await Promise.all(talkers.map((talker) => talker.stop()));
  const total = 9 + said.flat().length;
  for (const client of [ada, grace]) await client.until(() => client.messages().length === total);
  assertEquals(seqs(ada.messages()), count(1, total));
  assertEquals(ada.messages(), grace.messages());
  for (const lines of said) assertEquals(texts(ada.messages()).filter((text) => lines.includes(text)), lines);
});

test("two processes on one file are one room, also while one is stopped, and one that ends is not here", async () => {
  await using file = await temporary();
  const env = { CHAT_DB: file.db };
  await using one = await Program.start(env);
  await using two = await Program.start(env);
  await using ada = await Client.open(one, { username: "Ada" });
  await using grace = await Client.open(two, { username: "Grace" });
  const told = await delay(ada, grace);
  assert(told < 450, `${told} ms`); // 300 on a quiet machine
  const talkers = [new Talker(one, "one"), new Talker(two, "two")];
  for (const client of [ada, grace]) await client.until(() => client.messages().length > 100);
  Deno.kill(two.pid, "SIGSTOP");
  // The pause itself is tried. If it comes in the middle of a write, the file is locked and nobody can write until it ends.
  await new Promise((resolve) => setTimeout(resolve, 2000));
  Deno.kill(two.pid, "SIGCONT");
  const said = await Promise.all(talkers.map((talker) => talker.stop()));
  const total = 9 + said.flat().length;
  for (const client of [ada, grace]) await client.until(() => client.messages().length === total);
  assertEquals(seqs(ada.messages()), count(1, total));
  assertEquals(ada.messages(), grace.messages());
  for (const lines of said) assertEquals(texts(ada.messages()).filter((text) => lines.includes(text)), lines);
  await ada.has(({ joined }) => joined?.includes("Grace"));
  await two.end("SIGTERM");
  await ada.has(({ left }) => left?.includes("Grace"));
});

test("a page that moves to another instance keeps its place", async () => {
  await using file = await temporary();
  await using one = await start(file);
  await using two = await start(file);
  await using ada = await Client.open(one);
  const { time } = await ada.say("1", "2", "3");
  await using moved = await Client.open(two, { since: 3, time });
  assertEvent(moved.events.find(is("joined")), { event: "joined", seq: 3, oldest: 1, resumed: true });
  assertEquals(moved.messages(), []);
});

test("what is written while an instance reads is read next", async () => {
  using kv = await Deno.openKv(":memory:");
  await using other = await start({ db: kv });
  await using ada = await Client.open(other);
  await ada.say("1");
  const { db, asked, answer } = slowHead(kv, 1); // one answer shows that there is something to read
  await using chat = await start({ db });
  await using plain = await Client.open(chat);
  await ada.say("2");
  await asked();
  const { seq, time } = await ada.say("3");
  await using moved = await Client.open(chat);
  const joined = moved.ask({ event: "join", since: seq, time }, is("joined"));
  await plain.ask("no frame", is("error")); // the join has come by now
  answer();
  assertEvent(await joined, { event: "joined", seq: 3, oldest: 1, resumed: true });
});

test("an instance that writes without a pause lets another write, too", async () => {
  using kv = await Deno.openKv(":memory:");
  const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
  const near = unreliable(
    kv,
    async (call, name) => name === "commit" ? await call().finally(() => wait(20)) : await call(),
  );
  const far = unreliable(kv, async (call) => await call().finally(() => wait(30))); // others commit while it reads
  await using here = await start({ db: near });
  await using there = await start({ db: far });
  await using ada = await Client.open(here, { username: "Ada" });
  await using grace = await Client.open(there, { username: "Grace" });
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 2);
  const talking = setInterval(() => ada.send({ username: "Ada", message: "on and on" }), 5);
  try {
    for (const text of numbered(5)) await grace.say(text);
  } finally {
    clearInterval(talking);
  }
});

test("an instance that ends writes what is pending without a pause", async () => {
  using kv = await Deno.openKv(":memory:");
  const slow = unreliable(kv, async (call, name) => {
    return await call().finally(() => name === "commit" && new Promise((resolve) => setTimeout(resolve, 30)));
  });
  const here = await start({ db: slow });
  await using there = await start({ db: kv });
  await using ada = await Client.open(here, { username: "Ada" });
  await using _grace = await Client.open(there, { username: "Grace" });
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 2);
  const texts = numbered(150).map((text) => text.padEnd(2000, ".")); // five commits
  for (const message of texts) ada.send({ username: "Ada", message });
  ada.send({ event: "ping" });
  await ada.has(is("pong"));
  await here.shutdown();
  await ada.until(() => ada.closed);
  assertEquals(ada.messages().length, texts.length);
});

test("an instance that others outrun goes on, and what is said there gets in", async () => {
  await using file = await temporary();
  await using one = await start({ ...file, history: 5 });
  await using two = await start({ ...file, history: 5 });
  /** Says it on the instance that is outrun, again whenever the connection is closed because the next is deleted. */
  const insist = async (message: string): Promise<Received> => {
    const id = message.replace(" ", "-");
    await using ada = await Client.open(one);
    ada.send({ username: "Ada", message, id });
    const own = await ada.until(() => ada.events.find((event) => event.id === id) ?? ada.closed);
    if ("seq" in own) return own;
    assertMatch(`${own.code} ${own.reason}`, /^1013 (?!.*replaced)/);
    return await insist(message);
  };
  const talker = new Talker(two, "two", 20);
  for (const text of numbered(20, "outrun")) await insist(text);
  await talker.stop();
  await insist("last");
  const both = await until(async () => { // what connections that were closed had said may come still
    const [kept, others] = [await everything(one), await everything(two)];
    return JSON.stringify(kept) === JSON.stringify(others) ? kept : undefined;
  });
  assertEquals(seqs(both), count(both[4].seq - 4, both[4].seq));
});

test("who reads where an instance was outrun is told what is true, and what is said there gets in", async () => {
  using kv = await Deno.openKv(":memory:");
  await using two = await start({ db: kv, history: 5 });
  await using talker = await Client.open(two);
  await talker.say(...numbered(5));
  const { db, asked, answer } = slowHead(kv, 0);
  await using one = await start({ db, history: 5 });
  await using plain = await Client.open(one);
  await using ada = await Client.open(one, { username: "Ada", since: 5 });
  await talker.say("1");
  await asked();
  ada.send({ username: "Ada", message: "meanwhile", id: "meanwhile" });
  for (const text of numbered(5)) await talker.say(text); // the one after the gap takes the place of one before it
  answer();
  for (const reader of [plain, ada]) {
    const { code, reason } = await reader.ended();
    assertEquals([code, reason], [1013, "what comes next is no longer kept"]);
    assertEquals(reader.messages(), []);
  }
  await talker.has(({ id }) => id === "meanwhile");
  await using back = await Client.open(one, { since: 0 });
  await back.until(() => back.messages().at(-1)?.seq === 12);
  assertEquals(seqs(back.messages()), count(8, 12));
});

test("what another instance wrote in many entries comes in few frames", async () => {
  using kv = await Deno.openKv(":memory:");
  await using two = await start({ db: kv });
  await using talker = await Client.open(two);
  const { db, asked, answer } = slowHead(kv, 0);
  await using one = await start({ db });
  await using plain = await Client.open(one);
  await using ada = await Client.open(one, { username: "Ada", since: 0 });
  await talker.say("0");
  await asked();
  for (const text of numbered(100)) await talker.say(text);
  answer();
  for (const reader of [plain, ada]) {
    await reader.until(() => reader.messages().length === 101);
    assertEquals(seqs(reader.messages()), count(1, 101));
  }
  const frames = ada.frames.filter((frame) => frame.includes("receive_message"));
  assert(frames.length < 10, `${frames.length} frames`);
});

test("a room that is emptied while it is open begins anew, and its readers are told", async () => {
  using kv = await Deno.openKv(":memory:");
  await using chat = await start({ db: kv });
  await using ada = await Client.open(chat);
  await ada.say("1", "2", "3");
  const emptying = kv.atomic().delete(["chat", "head"]);
  for await (const { key } of kv.list({ prefix: ["chat", "log"] })) emptying.delete(key);
  await emptying.commit();
  assertEquals((await ada.ended()).code, 1013);
  await using back = await Client.open(chat, { since: 3 });
  assertEquals(back.events.find(is("joined"))?.resumed, false);
  assertEquals((await back.say("anew")).seq, 1);
});

test("an instance is here while it gives signs of life, whatever the clocks say", async () => {
  using kv = await Deno.openKv(":memory:");
  const key = ["chat", "here", "other"], now = performance.now.bind(performance), date = Date.now;
  let later = 0;
  using _clock = patch(performance, "now", () => now() + later);
  await kv.set(key, { online: 2, users: ["Ghost"] });
  await using chat = await start({ db: kv });
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 3);
  using _wall = patch(Date, "now", () => date() - 3_600_000); // set back by an hour: nothing follows from that
  for (const sign of [1, 2]) {
    later += 20_000;
    await kv.set(key, { online: 2 + sign, users: ["Ghost"] });
    await ada.until(() => ada.events.findLast(is("presence"))?.online === 3 + sign);
  }
  const own = await until(async () =>
    (await Array.fromAsync(kv.list({ prefix: ["chat", "here"] })))
      .find((entry) => entry.key[2] !== "other")
  );
  later += 20_000; // now this instance gives a sign of its own
  await until(async () => (await kv.get(own.key)).versionstamp !== own.versionstamp);
  later += 20_000;
  assertEquals((await ada.has(({ left }) => left?.includes("Ghost"))).online, 1);
});

// ───────────────────────────────────────────── On the open internet ─────────────────────────────────────────────

test("who is elsewhere is seen, also after a question that the database never answered", async () => {
  using kv = await Deno.openKv(":memory:");
  const hung = Promise.withResolvers<void>();
  let hangs = false;
  const db = unreliable(kv, async (call, name) => {
    if (hangs && name === "get") {
      hangs = false;
      hung.resolve();
      await new Promise(() => {});
    }
    return await call();
  });
  await using chat = await start({ db });
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 1);
  hangs = true;
  await hung.promise;
  await kv.set(["chat", "here", "other"], { online: 1, users: ["Lin"] });
  await ada.has(({ joined }) => joined?.includes("Lin"));
});

test("an instance that gives a sign of life at the last moment stays", async () => {
  using kv = await Deno.openKv(":memory:");
  const key = ["chat", "here", "other"];
  const deleting = Promise.withResolvers<void>();
  const db = unreliable(kv, async (call, name) => {
    if (name === "commit") {
      await kv.set(key, { online: 2, users: ["Lin"] });
      deleting.resolve();
    }
    return await call();
  });
  await kv.set(key, { online: 1, users: ["Lin"] });
  await using chat = await start({ db });
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 2);
  using _later = later(40_000);
  await Promise.race([deleting.promise, until(async () => (await kv.get(key)).value === null)]);
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 3);
});

test("a handshake from another site is refused before the upgrade", async () => {
  await using file = await temporary();
  await using chat = await start({ allowedOrigins: ["https://other.example"] });
  await using safe = await start(await certificate(file.folder));
  const tls = () => Deno.connectTls({ hostname: "localhost", port: safe.addr.port, caCerts: [CERTIFICATE] });
  const status = async (host: string, origin?: string, to?: Deno.Conn) => {
    const lines = [...HANDSHAKE.with(1, `Host: ${host}`), ...origin === undefined ? [] : [`Origin: ${origin}`]];
    using raw = await Raw.connect(to ?? chat.addr.port, ...lines);
    return await raw.status();
  };
  const allowed: [string, string?][] = [
    ["chat.example"],
    ["chat.example", "http://chat.example"],
    ["chat.example", "https://chat.example"],
    ["chat.example:443", "https://chat.example"],
    ["chat.example:80", "http://chat.example"],
    ["chat.example:8000", "http://chat.example:8000"],
    ["chat.example", "https://other.example"],
  ];
  for (const [host, origin] of allowed) assertEquals(await status(host, origin), 101, `${host} ${origin}`);
  const foreign = ["http://other.example", "http://chat.example:81", "http://chat.example.evil.example", "null", ""]
    .concat("chrome-extension://chat.example", "ftp://chat.example", "file://chat.example", "chat.example");
  for (const origin of foreign) assertEquals(await status("chat.example", origin), 403, origin);
  await using proxied = await start({ trustProxy: true });
  for (const [origin, expected] of [["https://chat.example", 101], ["http://chat.example", 403]]) {
    const headers = ["X-Forwarded-Proto: https", `Origin: ${origin}`];
    using raw = await Raw.connect(proxied.addr.port, ...HANDSHAKE.with(1, "Host: chat.example"), ...headers);
    assertEquals(await raw.status(), expected);
  }
  const own = `localhost:${safe.addr.port}`;
  assertEquals(await status(own, `https://${own}`, await tls()), 101);
  assertEquals(await status(own, `http://${own}`, await tls()), 403);
});

test("the page may run its own script and style and nothing else", async () => {
  await using chat = await start();
  const response = await fetch(`http://127.0.0.1:${chat.addr.port}/`);
  const html = await response.text();
  const policy = response.headers.get("content-security-policy")!;
  for (const tag of ["script", "style"]) {
    const [, content] = html.match(new RegExp(`<${tag}[^>]*>([^]*?)</${tag}>`))!;
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", encoder.encode(content)));
    assert(policy.includes(`${tag}-src 'sha256-${digest.toBase64()}'`), tag);
  }
  const strict = ["default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"];
  for (const directive of [...strict, "form-action 'none'"]) assert(policy.includes(directive), directive);
  assert(!policy.includes("unsafe"));
  const headers = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
  };
  for (const [name, value] of Object.entries(headers)) assertEquals(response.headers.get(name), value);
  assert(response.headers.has("permissions-policy"));
});

test("who does not know the password sees nothing and can say nothing", async () => {
  await using chat = await start({ password: "pässword", idleTimeout: 1 });
  await using ada = await Client.open(chat, { username: "Ada", password: "pässword" });
  await using idle = await Client.open(chat); // which does not join in time
  await using stranger = await Client.open(chat);
  for (const event of [{ username: "Eve", message: "Hi" }, { event: "history", before: 9 }, { event: "ping" }]) {
    assertMatch((await stranger.ask(event)).error, /password/);
  }
  await ada.say("a secret");
  stranger.send({ event: "join", username: "Eve", password: "passwort" });
  stranger.send({ event: "join", username: "Eve", password: "pässword" });
  stranger.send({ username: "Eve", message: "let me in" });
  const begun = performance.now();
  assertEquals((await stranger.ended()).code, 1008);
  assert(performance.now() - begun > 500, "a wrong password is answered after a pause");
  assertEquals((await idle.ended()).code, 1008);
  assertEquals([...stranger.events, ...idle.events].filter(({ event }) => event !== "error"), []);
  assertEquals(texts(ada.messages()), ["a secret"]);
  assert(!ada.events.some(({ joined }) => joined?.includes("Eve")));
});

test("an address that guesses passwords has to wait, nobody else, and who only comes has not guessed", async () => {
  await using chat = await start({ password: "secret", trustProxy: true });
  const join = async (address: string, password?: string) => {
    const raw = await Raw.open(chat.addr.port, `X-Forwarded-For: 203.0.113.9, ${address}`);
    await raw.frame({ event: "join", username: "Eve", password });
    return raw;
  };
  const visits = await Promise.all(count(1, 20).map(async () => await (await join("192.0.2.1")).drain()));
  for (const { code } of visits) assertEquals(code, 1008);
  const visitor = await join("192.0.2.1", "secret");
  assertMatch(`${await visitor.next()}`, /"joined"/);
  visitor[Symbol.dispose]();
  {
    const now = performance.now();
    using _still = patch(performance, "now", () => now); // so that nothing is forgiven meanwhile
    const guesses = count(1, 12).map(async (i) => await (await join("192.0.2.1", `guess ${i}`)).drain());
    const codes = (await Promise.all(guesses)).map(({ code }) => code);
    assert(codes.includes(1008));
    assert(codes.filter((code) => code === 1013).length >= 5, codes.join());
    assertEquals((await (await join("192.0.2.1", "secret")).drain()).code, 1013);
    using elsewhere = await join("192.0.2.2", "secret");
    assertMatch(`${await elsewhere.next()}`, /"joined"/);
  }
  using _later = later(6000);
  using forgiven = await join("192.0.2.1", "secret");
  assertMatch(`${await forgiven.next()}`, /"joined"/);
});

test("a flood is held back, and an honest sender loses nothing", async () => {
  await using chat = await start({ rateLimit: 5 });
  await using ada = await Client.open(chat, { username: "Ada" });
  await using grace = await Client.open(chat, { username: "Grace" });
  for (const id of count(1, 40).map(String)) ada.send({ username: "Ada", message: id, id });
  const refused = () => ada.events.filter(is("error"));
  await ada.until(() => refused().length + ada.messages().length === 40);
  assert(ada.messages().length >= 25 && ada.messages().length <= 30, `${ada.messages().length} came through`);
  for (const { id, error, retry_after } of refused()) {
    assertMatch(error, /too many .* try again in [\d.]+ s/);
    assert(retry_after > 0 && retry_after <= 1000 && Number(id) > 25);
  }
  assertEquals((await grace.say("I am not concerned")).event, "receive_message");
  const { id, retry_after } = refused()[0];
  using _later = later(retry_after);
  await ada.ask({ username: "Ada", message: "again", id }, (event) => event.id === id && event.seq);
});

test("pings, joins, typing and history are limited too", async () => {
  await using chat = await start({ rateLimit: 20 });
  for (const event of ["ping", "join", "typing", "history"]) {
    await using eve = await Client.open(chat, { username: "Eve" });
    for (let i = 0; i < 30; i++) eve.send({ event, before: i % 2 ? 1 : -1 });
    const { error, retry_after } = await eve.has(({ error }) => error?.startsWith("too many"));
    assertMatch(error, new RegExp(`${event}.*try again`));
    assert(retry_after > 0 && retry_after <= 1000);
  }
});

test("a frame is paid for by its size, before it is read", async () => {
  await using chat = await start({ rateLimit: 20 });
  await using eve = await Client.open(chat);
  const padding = "x".repeat(10_000); // as much as ten short frames
  for (const id of count(1, 90).map(String)) eve.send({ username: "Eve", message: id, id, padding });
  await eve.until(() => eve.messages().length + eve.events.filter(is("error")).length === 90);
  const refused = eve.events.filter(is("error"));
  assert(refused.length > 5, `${refused.length} were refused`);
  for (const { error, id } of refused) assertMatch(`${error} ${id}`, /^too many frames: try again in .* undefined$/);
});

test("requests over the limit are held, but not more than a thousand at a time", async () => {
  await using chat = await start({ rateLimit: 20 });
  const { setTimeout } = globalThis, { port } = chat.addr;
  using _endless = patch(
    globalThis,
    "setTimeout",
    ((work: () => void, ms: number) => {
      if (ms !== 1000) return setTimeout(work, ms);
    }) as typeof setTimeout,
  );
  // GET / over HTTP/2, as its default table of headers has it, in one connection after the other.
  const preface = encoder.encode("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
  const ask = (stream: number) => [0, 0, 6, 1, 5, 0, 0, stream >> 8, stream & 255, 0x82, 0x86, 0x84, 0x41, 1, 97];
  const conns = await Promise.all(count(1, 10).map(() => Deno.connect({ port })));
  const frames = new Uint8Array([...preface, ...settings, ...count(0, 150).flatMap((i) => ask(2 * i + 1))]);
  for (const conn of conns) await conn.write(frames);
  const fetching = new AbortController();
  let isRefused = false;
  const look = async () => {
    const { status, body } = await fetch(`http://127.0.0.1:${port}/healthz`, fetching);
    await body?.cancel();
    isRefused ||= status === 429;
  };
  await until(() => {
    for (let i = 0; i < 10; i++) look().catch(() => {}); // more than are let in again
    return isRefused;
  }).finally(() => fetching.abort());
  for (const conn of conns) conn.close();
});

test("a client that ignores the errors is closed", async () => {
  await using chat = await start({ rateLimit: 20 });
  await using eve = await Client.open(chat);
  for (let errors = 0; !eve.closed; errors++) {
    assert(errors < 1000, "it was never closed");
    eve.send("nonsense");
    await eve.until(() => eve.closed || eve.events.length > errors);
  }
  assertEquals(eve.closed.code, 1013);
});

test("frames that cost much are paid for before they are read, and nobody waits for them", async () => {
  await using program = await Program.start({ CHAT_RATE_LIMIT: "20", CHAT_PASSWORD: "secret" });
  await using ada = await Client.open(program, { username: "Ada", password: "secret" });
  await using eve = await Client.open(program);
  let longest = 0;
  for (let i = 0; i < 20; i++) {
    if (!eve.closed) eve.send({ event: "join", username: "e" + "\u0301\u0323".repeat(15_500) });
    if (i % 4) continue; // as many as a client may send
    const begun = performance.now();
    await ada.ask({ event: "ping" }, is("pong"));
    longest = Math.max(longest, performance.now() - begun);
  }
  assert(longest < 300, `${longest} ms`); // 100 on a quiet machine; it was 12 s
  await eve.until(() => eve.closed || eve.events.some(is("error")));
});

test("a letter keeps few marks, and who sends more than a name can have is refused before they are sorted", async () => {
  await using chat = await start();
  await using eve = await Client.open(chat);
  const { normalize } = String.prototype;
  let stacked = 0;
  using _watched = patch(String.prototype, "normalize", function (this: string) {
    stacked = Math.max(stacked, ...[...this.matchAll(/\p{M}+/gu)].map(([marks]) => marks.length));
    return normalize.call(this);
  });
  const clean = async (username: string) => {
    const { event, username: name } = await eve.ask(
      { username, message: "Hi" },
      (event) => event.message || event.error,
    );
    return event === "error" ? event : name;
  };
  const omega = "\u03c9\u0314\u0342\u0345"; // four that become one
  assertEquals(await clean(omega.repeat(30)), "\u1fa7".repeat(30));
  for (const marks of ["\u0f73", "\u0301\u0323", "\u0f71\u0f72"]) { // the first becomes two
    const name = await clean(`e${marks.repeat(19)}`);
    assert(name !== "error" && name.length <= 9, name);
    assertEquals(await clean(name), name);
    assertEquals(await clean(`e${marks.repeat(50)}`), "error");
    assertEquals(await clean(`e${marks.repeat(5000)}`), "error");
  }
  assert(stacked <= 240, `${stacked}`); // what a name may have uncleaned, or twice that when taken apart
});

test("what a client sends at once is handled in many turns of the event loop if it takes long", async () => {
  await using chat = await start({ rateLimit: 0 });
  await using eve = await Client.open(chat);
  const { normalize } = String.prototype;
  let cleaned = 0, most = 0, isOver = false;
  using _slow = patch(String.prototype, "normalize", function (this: string, form?: string) {
    cleaned++;
    for (const end = performance.now() + 1; performance.now() < end;);
    return normalize.call(this, form);
  });
  const watching = (async () => {
    for (let before = 0; !isOver; before = cleaned) {
      await new Promise((resolve) => setImmediate(resolve));
      most = Math.max(most, cleaned - before);
    }
  })();
  const texts = numbered(100);
  for (const message of texts) eve.send({ username: "Ève", message });
  await eve.until(() => eve.messages().length === texts.length);
  isOver = true;
  await watching;
  assertEquals(eve.messages().map(({ message }) => message), texts);
  assert(most < 30, `${most} at a time`);
});

test("what arrived before the end is handled, and many frames that wait for a join are, too", async () => {
  const chat = await start({ rateLimit: 0 });
  await using ada = await Client.open(chat, { username: "Ada" });
  await using eve = await Client.open(chat, { username: "Eve" });
  const texts = numbered(3000);
  eve.send({ event: "join", username: "Eve", since: 1e12 });
  for (const message of texts) eve.send({ username: "Eve", message });
  await ada.has(({ message }) => message === "message 3000");
  const { digest } = SubtleCrypto.prototype;
  using _slow = patch(SubtleCrypto.prototype, "digest", async function (this: SubtleCrypto, ...args) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    return await digest.apply(this, args);
  });
  using raw = await Raw.open(chat.addr.port);
  await raw.frame({ event: "join", username: "Lin", key: "a-key-of-16-bytes" });
  for (const message of numbered(50, "last")) await raw.frame({ username: "Lin", message });
  await raw.frame("arrived", { head: 0x89 }); // a ping is answered once what is before it has been read
  while (await raw.next() !== "arrived");
  await Promise.all([chat.shutdown(), raw.drain()]);
  await ada.until(() => ada.closed);
  assertEquals(ada.messages().map(({ message }) => message), [...texts, ...numbered(50, "last")]);
});

test("what a client sent is handled even if it closes while that waits", async () => {
  await using chat = await start({ rateLimit: 0 });
  await using ada = await Client.open(chat, { username: "Ada" });
  await using eve = await Client.open(chat, { username: "Eve" });
  const { normalize } = String.prototype;
  using _slow = patch(String.prototype, "normalize", function (this: string, form?: string) {
    for (const end = performance.now() + 1; performance.now() < end;);
    return normalize.call(this, form);
  });
  const texts = numbered(50);
  for (const message of texts) eve.send({ username: "Ève", message });
  const left = eve[Symbol.asyncDispose]();
  await ada.until(() => ada.messages().length === texts.length);
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 1);
  await left;
});

test("a name is cleaned only if its event is paid for, and taken apart only if it is short", async () => {
  await using chat = await start({ rateLimit: 20 });
  await using eve = await Client.open(chat);
  const { normalize } = String.prototype;
  let composed = 0, apart = 0;
  using _watched = patch(String.prototype, "normalize", function (this: string, form?: string) {
    if (form === "NFD") apart++;
    else composed++;
    return normalize.call(this, form);
  });
  await eve.ask({ username: "Eve", message: "" }, is("error"));
  assertEquals(composed, 0);
  await eve.ask({ username: "\u01d6".repeat(41), message: "Hi" }, is("error"));
  assertEquals([composed, apart], [1, 0]);
  const joins = 30; // as many as 10 are paid for at once
  for (let i = 0; i < joins; i++) eve.send({ event: "join", username: "\u01d6".repeat(41) });
  await eve.until(() => eve.events.filter(is("error")).length === joins + 2);
  assert(composed < 20, `${composed} names`);
});

test("a frame of many values is refused unread, and one of many brackets in a text is not", async () => {
  await using chat = await start();
  await using eve = await Client.open(chat);
  const parse = JSON.parse, read: string[] = [];
  using _watched = patch(JSON, "parse", (text, reviver) => {
    read.push(text);
    return parse(text, reviver);
  });
  const many = count(1, 6000), text = '[{"\\'.repeat(500);
  for (const start of ["", '{"username":"Eve","message":"Hi","more":']) {
    for (
      const more of [
        "[".repeat(60_000),
        `${many.map(() => "[")}`,
        `{"${many.join('":1,"')}":1}`,
        `["${many.join('","')}"]`,
      ]
    ) {
      assertMatch((await eve.ask(start + more, is("error"))).error, /a frame must be .*values/);
      assert(!read.some((text) => text.includes(more)), more.slice(0, 20));
    }
  }
  assertEquals((await eve.say(text)).message, text);
});

test("a room that is full answers 503, and lets the next in when someone leaves", async () => {
  await using chat = await start({ maxClients: 3, maxClientsPerAddress: 2, trustProxy: true });
  using guests = new DisposableStack();
  const come = async (address: string) => {
    const raw = guests.use(await Raw.connect(chat.addr.port, ...HANDSHAKE, `X-Forwarded-For: ${address}`));
    return await raw.status();
  };
  using first = await Raw.open(chat.addr.port, "X-Forwarded-For: 192.0.2.1");
  const statuses = [];
  for (const address of ["192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3"]) statuses.push(await come(address));
  assertEquals(statuses, [101, 503, 101, 503]);
  first[Symbol.dispose]();
  await until(async () => await come("192.0.2.3") === 101);
  using late = await Raw.connect(chat.addr.port, ...HANDSHAKE);
  assertMatch(await late.head(), /^HTTP\/1.1 503 [^]*\r\nretry-after: \d+\r\n/i);
});

test("handshakes that come at one moment do not pass the limit together", async () => {
  await using chat = await start({ maxClients: 5 });
  using guests = new DisposableStack();
  const statuses = await Promise.all(
    count(1, 40).map(async () => {
      const raw = guests.use(await Raw.connect(chat.addr.port, ...HANDSHAKE));
      return await raw.status();
    }),
  );
  assertEquals(statuses.filter((status) => status === 101).length, 5);
});

test("a handshake during which the process stood still makes a client like any other", async () => {
  const { upgradeWebSocket } = Deno, still = new Int32Array(new SharedArrayBuffer(4));
  await using chat = await start({ maxClients: 3, idleTimeout: 1, password: "secret" });
  await using ada = await Client.open(chat, { username: "Ada", password: "secret" });
  using _stall = patch(Deno, "upgradeWebSocket", (...request) => {
    queueMicrotask(() => Atomics.wait(still, 0, 0, 1500)); // the deadline has passed before the socket opens
    return upgradeWebSocket(...request);
  });
  await using grace = await Client.open(chat);
  await grace.ask({ event: "join", username: "Grace", password: "secret" }, is("joined"));
  await ada.say("Hi");
  await grace.has(({ message }) => message === "Hi");
  await using stranger = await Client.open(chat);
  using late = await Raw.connect(chat.addr.port, ...HANDSHAKE);
  assertEquals(await late.status(), 503);
  assertEquals((await stranger.ended()).code, 1008);
});

test("a password that came in time counts, also if the process stood still meanwhile", async () => {
  await using chat = await start({ idleTimeout: 1, password: "secret" });
  await using ada = await Client.open(chat);
  ada.send({ event: "join", username: "Ada", password: "secret" });
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1500);
  await ada.has(is("joined"));
});

test("an address that asks for too much is refused for a while, its next request waits, and nobody else does", async () => {
  await using chat = await start({ rateLimit: 20, trustProxy: true });
  const ask = (address: string, ...lines: string[]) =>
    Raw.connect(chat.addr.port, ...lines, `X-Forwarded-For: ${address}`);
  const come = async (address: string, ...lines: string[]) => {
    using raw = await ask(address, ...lines, ...lines.length ? [] : HANDSHAKE);
    return await raw.head();
  };
  {
    const now = Math.ceil(performance.now()); // whole, so that the steps add up exactly
    using _still = patch(performance, "now", () => now); // so that nothing is forgiven meanwhile
    for (let i = 0; i < 10; i++) {
      const heads = await Promise.all(count(1, 50).map(() => come("192.0.2.1")));
      for (const head of heads) assertMatch(head, /^HTTP\/1.1 101 /);
    }
    assertMatch(await come("192.0.2.1"), /^HTTP\/1.1 429 [^]*\r\nretry-after: 1\r\n/i);
    const page = ["GET / HTTP/1.1", "Host: chat.example"], forwarded = "X-Forwarded-For: 192.0.2.1";
    using greedy = await ask("192.0.2.1", ...count(1, 9).flatMap(() => [...page, forwarded, ""]), ...page);
    const refused = greedy.head();
    assertMatch(await come("192.0.2.2", ...page), /^HTTP\/1.1 200 /);
    assertMatch(await refused, /^HTTP\/1.1 429 /);
    assertEquals(greedy.unread.split("HTTP/1.1").length, 1); // one answer and no other
  }
  assertMatch(await come("192.0.2.2"), /^HTTP\/1.1 101 /);
  using _later = later(1000);
  assertMatch(await come("192.0.2.1"), /^HTTP\/1.1 101 /);
});

test("to know whether there is room for an address costs the same, however many are there", async () => {
  using _still = patch(globalThis, "setInterval", (() => 0) as unknown as typeof setInterval); // nothing else happens
  await using chat = await start({ maxClients: 60, maxClientsPerAddress: 50, trustProxy: true });
  const guests = await Promise.all(count(1, 50).map(() => Raw.open(chat.addr.port, "X-Forwarded-For: 192.0.2.1")));
  const iterator = Object.getPrototypeOf(new Set().values()), { next } = iterator;
  const answers: string[] = [];
  let steps = 0;
  {
    using _watched = patch(iterator, "next", function (this: unknown, ...args: unknown[]) {
      steps++;
      return next.apply(this, args);
    });
    for (const address of ["192.0.2.1", "192.0.2.2"]) {
      const headers = { "x-forwarded-for": address };
      answers.push(await (await fetch(`http://127.0.0.1:${chat.addr.port}/healthz`, { headers })).text());
    }
  }
  assertEquals(answers, ["full\n", "ok\n"]);
  assert(steps < 50, `${steps} steps through sets`);
  for (const guest of guests) guest[Symbol.dispose]();
});

test("a long Accept-Encoding holds nobody up", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat);
  const { split } = String.prototype;
  let parts = 0;
  using _watched = patch(String.prototype, "split", function (this: string, ...how: unknown[]) {
    const all: string[] = Reflect.apply(split, this, how);
    parts = Math.max(parts, all.length);
    return all;
  });
  for (const [sign, coding] of [[";", undefined], [",", "br"]]) {
    const accepted = `Accept-Encoding: gzip;q=0, ${sign!.repeat(32_000)} ${coding}`;
    using raw = await Raw.connect(chat.addr.port, "GET / HTTP/1.1", "Host: chat.test", accepted);
    const begun = performance.now();
    await Promise.all([raw.status(), ada.ask({ event: "ping" }, is("pong"))]);
    assert(performance.now() - begun < 1000, "it took 10 s once"); // a few milliseconds
  }
  assert(parts < 1000, `it was split into ${parts}`);
});

test("who reconnects finds the limit for messages as it was left", async () => {
  await using chat = await start({ rateLimit: 2 });
  for (const accepted of [10, 0]) {
    await using ada = await Client.open(chat, { username: "Ada" });
    const from = ada.events.length;
    for (let i = 1; i <= 12; i++) ada.send({ username: "Ada", message: `${i}` });
    const answers = () => ada.events.slice(from).filter(({ event, message }) => event === "error" || message);
    await ada.until(() => answers().filter(({ seq, error }) => error || seq).length >= 12);
    const refused = answers().filter(({ error }) => error).length;
    assert(refused >= 12 - accepted - 1, `${refused} of 12 were refused`);
  }
});

test("nobody gets rid of a limit through another connection, and nobody spends for another", async () => {
  await using chat = await start({ rateLimit: 2 });
  const idle = await Client.open(chat);
  const flood = async () => {
    await using ada = await Client.open(chat);
    const ids = count(1, 12).map(() => crypto.randomUUID());
    for (const id of ids) ada.send({ username: "Ada", message: "flood", id });
    await ada.until(() => ids.every((id) => ada.events.some((event) => event.id === id)));
    return ada.events.filter(is("error")).length;
  };
  await idle.say("once");
  assert(await flood() <= 3);
  await using neighbour = await Client.open(chat); // its limit is what is left, and from then on its own
  await idle[Symbol.asyncDispose]();
  await using _bystander = await Client.open(chat);
  assert(await flood() >= 9);
  const wait = async (): Promise<number> => {
    const { retry_after } = await neighbour.ask({ username: "Lin", message: "Hi" }, ({ event }) => event === "error");
    return retry_after;
  };
  const first = await wait();
  await flood();
  assert(await wait() <= first + 100);
});

test("a peer that does not answer pings is closed and counted once, and one that does stays", async () => {
  await using chat = await start({ idleTimeout: 1, maxClients: 4 });
  await using ada = await Client.open(chat, { username: "Ada" });
  const dead = await Promise.all(count(1, 3).map(() => Raw.open(chat.addr.port)));
  for (const [i, raw] of dead.entries()) await raw.frame({ event: "join", username: `Dead ${i}` });
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 4);
  await ada.until(() => ada.events.findLast(is("presence"))?.online === 1);
  for (const raw of dead) raw[Symbol.dispose]();
  using guests = new DisposableStack();
  let places = 0;
  const come = async () => {
    const raw = guests.use(await Raw.connect(chat.addr.port, ...HANDSHAKE));
    if (await raw.status() === 101) places++;
    return places;
  };
  await until(async () => await come() === 3);
  for (let i = 0; i < 5; i++) assertEquals(await come(), 3);
  assertEquals(ada.closed, undefined);
});

test(
  "a process that has no file handles left keeps its people and takes new ones later",
  { ignore: NO_SHELL },
  async () => {
    await using program = new Program({ PORT: `${freePort()}` }, { shell: 'ulimit -n 100; exec "$@"' });
    await program.serves();
    await using ada = await Client.open(program, { username: "Ada" });
    await using grace = await Client.open(program, { username: "Grace" });
    const connected = await Promise.allSettled(count(1, 120).map(() => Deno.connect(program.addr)));
    await ada.say("still here");
    await grace.has(({ message }) => message === "still here");
    for (const { value } of connected as { value?: Deno.Conn }[]) value?.close();
    await until(async () => {
      const lin = new Client(`ws://127.0.0.1:${program.addr.port}/`);
      await lin.until(() => lin.opened || lin.closed);
      if (lin.opened) await lin.say("new");
      await lin[Symbol.asyncDispose]();
      return lin.events.length > 0;
    });
    await grace.has(({ message }) => message === "new");
    assertEquals([ada.closed, grace.closed], [undefined, undefined]);
  },
);

test("a host that is none is a bad request, and no host holds anyone up", async () => {
  await using chat = await start();
  using _parser = patch(globalThis, "URL", undefined as never); // it may take long
  const long = encodeURIComponent(numbered(300, "\u4e00").join("")).slice(0, 50_000);
  for (const [host, served] of [["a b", 400], ["a<b", 400], [long, 400], ["[", 200], ["x:99999", 200], ["a%", 200]]) {
    using raw = await Raw.connect(chat.addr.port, "GET / HTTP/1.1", `Host: ${host}`);
    assertEquals(await raw.status(), served);
    for (const origin of ["http://x", `http://${long}`]) {
      const handshake = [...HANDSHAKE.with(1, `Host: ${host}`), `Origin: ${origin}`];
      using raw = await Raw.connect(chat.addr.port, ...handshake);
      assertEquals(await raw.status(), served === 200 ? 403 : 400);
    }
  }
});

test("a frame over 64 KiB closes its connection with 1009", async () => {
  await using chat = await start();
  for (const frame of ["x".repeat(65_537), "€".repeat(22_000), new Uint8Array(65_537)]) {
    await using eve = await Client.open(chat);
    eve.send(frame);
    assertEquals((await eve.ended()).code, 1009);
    assertEquals(eve.events, []);
  }
  await using ada = await Client.open(chat);
  assertMatch((await ada.ask(" ".repeat(65_536))).error, /JSON/);
});

/** Two who chat on, whatever happens to others; at the end they have lost nothing. */
async function undisturbed(chat: Place, disturb: () => Promise<void>): Promise<void> {
  await using ada = await Client.open(chat, { username: "Ada" });
  await using grace = await Client.open(chat, { username: "Grace" });
  let said = 0, disturbing = true;
  const talking = (async () => {
    while (disturbing) {
      await (said % 2 ? ada : grace).say(`${++said}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  })();
  await disturb();
  disturbing = false;
  await talking;
  const own = (client: Client) => client.messages().filter(({ username }) => /^(Ada|Grace)$/.test(username));
  for (const client of [ada, grace]) {
    await client.until(() => own(client).length === said);
    assertEquals(texts(own(client)), count(1, said).map(String));
    assertEquals(client.closed, undefined);
  }
}

test("broken bytes end at most their own connection", async () => {
  await using chat = await start({ idleTimeout: 1 });
  const hello = '{"username":"Eve","message":"Hi"}';
  const broken: [string, (raw: Raw) => Promise<void>][] = [
    ["invalid UTF-8", (raw) => raw.frame(new Uint8Array([0x22, 0xc3, 0x28, 0xff, 0x22]))],
    ["a frame that is not masked", (raw) => raw.frame("[]", { masked: false })],
    ["a frame that ends too early", (raw) => raw.frame("[]", { length: 60_000 })],
    ["a frame that says it has 2 GiB", (raw) => raw.frame("[]", { length: 2 ** 31 - 1 })],
    ["an opcode that does not exist", (raw) => raw.frame("[]", { head: 0x83 })],
    ["reserved bits", (raw) => raw.frame("[]", { head: 0xf1 })],
    ["a continuation of nothing", (raw) => raw.frame("[]", { head: 0x80 })],
    ["a fragmented ping", (raw) => raw.frame("x", { head: 0x09 })],
    ["a ping that is too long", (raw) => raw.frame("x".repeat(126), { head: 0x89 })],
    ["a close code that does not exist", (raw) => raw.frame(new Uint8Array([0xff, 0xff]), { head: 0x88 })],
    ["half a close code", (raw) => raw.frame(new Uint8Array([3]), { head: 0x88 })],
    ["deep JSON", (raw) => raw.frame("[".repeat(60_000))],
    ["deep JSON that ends", (raw) => raw.frame(`${"[".repeat(30_000)}${"]".repeat(30_000)}`)],
    ["a prototype", (raw) => raw.frame('{"__proto__":{"event":"send_message","username":"Eve","message":"Hi"}}')],
    ["a constructor", (raw) => raw.frame('{"constructor":{"prototype":{"message":"Hi"}},"event":"toString"}')],
    ["names that are objects", (raw) => raw.frame('{"username":{"length":3},"message":["Hi"],"id":{}}')],
    ["a huge number", (raw) => raw.frame(`{"event":"join","since":1e999}`)],
    ["another frame after the close", async (raw) => {
      await raw.frame(new Uint8Array([3, 232]), { head: 0x88 });
      await raw.frame(hello);
    }],
    ["nothing", () => Promise.resolve()],
  ];
  await undisturbed(chat, async () => {
    for (const [what, send] of broken) {
      using raw = await Raw.open(chat.addr.port);
      await send(raw).catch(() => {});
      await raw.frame("", { head: 0x88 }).catch(() => {});
      for (const { event, username, error = "" } of (await raw.drain()).events) {
        assert(event === "error" || /^(Ada|Grace)$/.test(username), `${what}: ${event}`);
        assert(!/\bat |main\.ts|file:|\//.test(error), error);
      }
    }
    using half = await Raw.connect(chat.addr.port, "GET / HTTP/1.1", "Upgrade: websocket");
    assertMatch(await half.head(), /^HTTP\/1.1 4\d\d /);
    using none = await Raw.connect(chat.addr.port, "\u0016\u0003\u0001");
    await none.drain();
  });
});

test("ten thousand random frames disturb nobody", async () => {
  const seed = Number(Deno.env.get("SEED") ?? crypto.getRandomValues(new Uint32Array(1))[0]);
  console.log(`SEED=${seed} repeats this`);
  let state = seed;
  const random = (below: number) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor(state / 2 ** 32 * below);
  };
  const pick = <T>(...values: T[]): T => values[random(values.length)];
  const value = (): unknown =>
    pick<() => unknown>(
      () => random(1000) - 500,
      () =>
        pick("send_message", "join", "history", "typing", "ping", "__proto__", "Eve", "", "\u0000", "\ud800", "\u202e"),
      () => "x".repeat(random(3000)),
      () => null,
      () => [value(), value()],
      () => ({ [pick("event", "message", "__proto__")]: value() }),
    )();
  const frame = (): string | Uint8Array => {
    const event: Record<string, unknown> = {};
    for (const key of ["event", "username", "message", "id", "since", "before", "password"]) {
      if (random(2)) event[key] = value();
    }
    const text = new TextEncoder().encode(JSON.stringify(event));
    if (random(4) === 0 && text.length > 0) text[random(text.length)] = random(256);
    return random(4) === 0 ? text.subarray(0, random(text.length)) : text;
  };
  await using chat = await start({ rateLimit: 1000 });
  await undisturbed(chat, async () => {
    for (let sent = 0; sent < 10_000;) {
      using raw = await Raw.open(chat.addr.port);
      const reading = raw.drain();
      try {
        for (let i = 0; i < 100 && sent < 10_000; i++, sent++) {
          await raw.frame(frame(), { head: random(8) ? 0x81 : random(256), masked: random(50) > 0 });
        }
        await raw.frame("", { head: 0x88 });
      } catch {
        // The server has closed it, as it should.
      }
      await reading; // which parses each line
    }
  });
});

test("with a certificate it serves HTTPS and WSS", async () => {
  await using file = await temporary();
  await using chat = await start(await certificate(file.folder));
  using client = Deno.createHttpClient({ caCerts: [CERTIFICATE] });
  const page = await fetch(`https://localhost:${chat.addr.port}/healthz`, { client });
  assertEquals(await page.text(), "ok\n");
  await using socket = new Client(`wss://localhost:${chat.addr.port}/`, { client });
  await socket.until(() => socket.opened);
  assertEvent(await socket.ask({ event: "ping" }), { event: "pong" });
});

/** For localhost, signed by itself, and good for nothing else. */
const CERTIFICATE = `-----BEGIN CERTIFICATE-----
MIIBlzCCAT6gAwIBAgIUYB9VBnO4QjDJM4qWcC1FC3qjisowCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjE3MjgzM1oYDzIxMjYxMDI5
MTcyODMzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATueXFRf+GiY90ove7JADAPaVv6Z6CWNRUKZRVJgz69TVIeAewvSrMF
v+AxiBCWZ2EFLDs3ieRTwoKL5MD8bgxQo2wwajAdBgNVHQ4EFgQUHVaVpWID7oLZ
M1whUsv74ZHBAmMwHwYDVR0jBBgwFoAUHVaVpWID7oLZM1whUsv74ZHBAmMwGgYD
VR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAwGA1UdEwEB/wQCMAAwCgYIKoZIzj0E
AwIDRwAwRAIgNvpDxha4kKHo/6DiDik8FLBrnDZ/OBt5lipxy08WDXQCIBBowC2B
JEifcE7OKRsanROtBWJ4zGAZxo7Vp85nQUd0
-----END CERTIFICATE-----
`;
const KEY = `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg0Mxmw1IMPdPA9htO
hekOMl2lnHzdZUUL98Zz3lAcQHyhRANCAATueXFRf+GiY90ove7JADAPaVv6Z6CW
NRUKZRVJgz69TVIeAewvSrMFv+AxiBCWZ2EFLDs3ieRTwoKL5MD8bgxQ
-----END PRIVATE KEY-----
`;

// ──────────────────────────────────────────────────── Browsers ────────────────────────────────────────────────────

/** Starts a program and resolves with its process and the first that it prints which the pattern is for. */
async function launch(program: string, args: string[], pattern: RegExp): Promise<[Deno.ChildProcess, string]> {
  const child = new Deno.Command(program, { args, stdout: "piped", stderr: "null" }).spawn();
  let said = "";
  for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
    const found = (said += text).match(pattern);
    if (found) return [child, found[1]];
  }
  throw new Error(`${program} ended: ${said}`);
}

const SWITCHES = "headless=new no-sandbox disable-gpu disable-background-networking disable-component-update " +
  "disable-sync no-first-run disable-background-timer-throttling disable-renderer-backgrounding process-per-site " +
  "disable-backgrounding-occluded-windows disable-dev-shm-usage renderer-process-limit=1 lang=en-GB " +
  "window-size=1100,800";

/** Chromium without what only a person at a screen needs, where Debian's package is there: the tests take less time. */
const SHELL = "/usr/lib/chromium/chromium-headless-shell"; // the script in the path would leave it running

/** The browsers: whether they are there, how they are started, and what is asked of them for a session. */
const BROWSERS = {
  Chromium: {
    missing: await isMissing("chromedriver", "--version") || await isMissing("chromium", "--version"),
    async drive() {
      const [driver, port] = await launch("chromedriver", ["--port=0"], /on port (\d+)\.\s/);
      return { port, processes: [driver] };
    },
    capabilities: {
      "goog:chromeOptions": {
        binary: await Deno.stat(SHELL).then(() => SHELL, () => undefined),
        args: SWITCHES.split(" ").map((arg) => `--${arg}`),
      },
      "goog:loggingPrefs": { browser: "ALL" },
    },
  },
  WebKit: {
    missing: await isMissing("WebKitWebDriver", "--help") || await isMissing("Xvfb", "-help"),
    async drive() {
      const screen = ["-displayfd", "1", "-screen", "0", "1400x1200x24", "-nolisten", "tcp"];
      const [display, number] = await launch("Xvfb", screen, /(\d+)\n/);
      const port = `${freePort()}`;
      const driver = new Deno.Command("WebKitWebDriver", {
        args: [`--port=${port}`],
        env: {
          DISPLAY: `:${number}`,
          WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS: "1", // root needs it
          WEBKIT_DISABLE_DMABUF_RENDERER: "1", // faster without a graphics card
        },
        stdout: "null",
        stderr: "null",
      }).spawn();
      await until(() => fetch(`http://127.0.0.1:${port}/status`).then((answer) => answer.text()).catch(() => ""));
      return { port, processes: [driver, display] };
    },
    capabilities: {},
  },
};

/** What people and tests find in the page, each at one place. It is made in the page, anew for each look. */
const inPage = () => {
  const all = (selector: string) => [...document.querySelectorAll<HTMLElement>(selector)];
  const one = (selector: string) => all(selector)[0];
  const isShown = (node?: Element | null) => !!node?.checkVisibility({ visibilityProperty: true });
  const log = one("[role=log]");
  return {
    all,
    one,
    isShown,
    log,
    /** What a test keeps in the page from one look to the next. */
    kept: globalThis as unknown as { seen: number[]; heard: string[]; longest: number; send: WebSocket["send"] },
    /** Everything that can be read. */
    get words() {
      return document.body.innerText;
    },
    get status() {
      return one("[role=status]").textContent;
    },
    /** The messages, also those on their way. */
    get articles() {
      return all("[role=log] article, [role=log] .row");
    },
    get texts() {
      return all("[role=log] .text").map((node) => node.textContent);
    },
    /** Those that stand at the right. */
    get mine() {
      return all("[role=log] .text").filter((node) => {
        const { left, right } = node.getBoundingClientRect(), around = log.getBoundingClientRect();
        return around.right - right < left - around.left;
      });
    },
    /** Whether every message is confirmed. */
    get isSettled() {
      return one("#waiting").childElementCount === 0;
    },
    get isAtEnd() {
      return log.scrollHeight - log.clientHeight - log.scrollTop < 2;
    },
    /** What is wider than its place. */
    get sideways() {
      return [document.documentElement, ...all("main, form, [role=log], [role=log] *")]
        .filter((node) => node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 1)
        .filter((node) => getComputedStyle(node).overflowX !== "visible")
        .map((node) => node.outerHTML);
    },
    /** Who is here. */
    get people() {
      return all("aside li bdi").map((node) => node.textContent);
    },
    /** The field with this label. */
    field(label: string) {
      const found = all("label").find((node) => node.textContent!.trim() === label) as HTMLLabelElement | undefined;
      return found?.control as HTMLTextAreaElement;
    },
    /** The button that has this in its name and is shown. */
    button(name: string) {
      return all("button").find((node) => isShown(node) && `${node.ariaLabel} ${node.innerText}`.includes(name))!;
    },
  };
};
type InPage = ReturnType<typeof inPage>;

/** A browser, driven through the WebDriver protocol with plain `fetch`. */
class Browser {
  #session = "";
  #processes: Deno.ChildProcess[] = [];

  private constructor(readonly kind: keyof typeof BROWSERS) {}

  static async open(kind: keyof typeof BROWSERS): Promise<Browser> {
    const browser = new Browser(kind), { drive, capabilities } = BROWSERS[kind];
    const { port, processes } = await drive();
    browser.#processes = processes;
    browser.#session = `http://127.0.0.1:${port}/session`;
    const session = await browser.#ask("POST", "", { capabilities: { alwaysMatch: capabilities } });
    browser.#session += `/${(session as { sessionId: string }).sessionId}`;
    return browser;
  }

  async #ask(method: string, path: string, body: unknown = {}): Promise<unknown> {
    const options = method === "POST" ? { method, body: JSON.stringify(body) } : { method };
    const response = await fetch(this.#session + path, options);
    const { value } = await response.json();
    if (!response.ok) throw new Error(`${path}: ${value.message}`);
    return value;
  }

  async close(): Promise<void> {
    await this.#ask("DELETE", "").catch(() => {});
    for (const child of this.#processes) {
      child.kill();
      await child.status;
    }
  }

  async goTo(url: string): Promise<void> {
    await this.#ask("POST", "/url", { url });
  }

  async reload(): Promise<void> {
    await this.#ask("POST", "/refresh");
  }

  /** Runs a function in the page. It sees what it is given and nothing else from here. */
  async run<Args extends unknown[], T>(look: (page: InPage, ...args: Args) => T, ...args: Args): Promise<T> {
    const script = `return (${look})((${inPage})(), ...arguments)`;
    return await this.#ask("POST", "/execute/sync", { script, args }) as T;
  }

  /** Waits in the page until the function gives something truthy. */
  async until<Args extends unknown[]>(look: (page: InPage, ...args: Args) => unknown, ...args: Args): Promise<void> {
    const wait = (look: () => unknown, ms: number, done: (trouble: string) => void) => {
      const late = Date.now() + ms;
      (function again(trouble = "") {
        try {
          if (look()) return done("");
        } catch (error) {
          trouble = `${error}`;
        }
        if (Date.now() > late) return done(`never came true: ${trouble}\n${document.body.innerText.slice(-1000)}`);
        setTimeout(again, 10);
      })();
    };
    const script = `const args = [...arguments], done = args.pop();
      (${wait})(() => (${look})((${inPage})(), ...args), ${DEADLINE}, done)`;
    const trouble = await this.#ask("POST", "/execute/async", { script, args });
    if (trouble) throw new Error(`${look} ${JSON.stringify(args)} ${trouble}`);
  }

  async #element(find: (page: InPage, name: string) => Element, name: string): Promise<string> {
    const found = await this.run(find, name);
    if (!found) throw new Error(`nothing is named ${name}: ${await this.run((page) => page.words)}`);
    return Object.values(found)[0];
  }

  /** Types into the field with this label. */
  async type(label: string, text: string): Promise<void> {
    const field = await this.#element((page, label) => page.field(label), label);
    await this.#ask("POST", `/element/${field}/value`, { text });
  }

  /** Clicks on the button with this in its name, or on what a selector finds. */
  async click(name: string): Promise<void> {
    const find = (page: InPage, name: string) => /^[#.[]/.test(name) ? page.one(name) : page.button(name);
    await this.#ask("POST", `/element/${await this.#element(find, name)}/click`);
  }

  /** Presses keys where the focus is; those in a string of several characters are held together. */
  async press(...keys: string[]): Promise<void> {
    const actions = keys.flatMap((chord) => [
      ...[...chord].map((value) => ({ type: "keyDown", value })),
      ...[...chord].reverse().map((value) => ({ type: "keyUp", value })),
    ]);
    await this.#ask("POST", "/actions", { actions: [{ type: "key", id: "keys", actions }] });
  }

  /** Turns the wheel over the middle of the log, by so many pixels at a time. */
  async wheel(...steps: number[]): Promise<void> {
    const [x, y] = await this.run(({ log }) => {
      const { left, top, width, height } = log.getBoundingClientRect();
      return [left + width / 2, top + height / 2].map(Math.round);
    });
    const actions = steps.map((deltaY) => ({ type: "scroll", x, y, deltaX: 0, deltaY, duration: 0 }));
    await this.#ask("POST", "/actions", { actions: [{ type: "wheel", id: "wheel", actions }] });
  }

  /** A command of the DevTools protocol: only in Chromium. */
  cdp(cmd: string, params: unknown = {}): Promise<unknown> {
    return this.#ask("POST", "/goog/cdp/execute", { cmd, params });
  }

  /** Sets the size of the view. */
  async resize(width: number, height: number): Promise<void> {
    if (this.kind === "Chromium") {
      const metrics = { width, height, deviceScaleFactor: 1, mobile: false };
      await this.cdp("Emulation.setDeviceMetricsOverride", metrics);
    } else {
      await this.#ask("POST", "/window/rect", { width, height: height + 38 }); // a bar is above the view
      await this.until((_, width, height) => innerWidth === width && innerHeight === height, width, height);
    }
  }

  /** Sets the size of the view, and the theme: only in Chromium. */
  async look(width: number, height: number, theme = "light"): Promise<void> {
    await this.resize(width, height);
    await this.cdp("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: theme }] });
  }

  async newTab(): Promise<string> {
    const { handle } = await this.#ask("POST", "/window/new", { type: "window" }) as { handle: string };
    await this.switchTo(handle);
    await this.resize(1100, 800);
    return handle;
  }

  async switchTo(handle: string): Promise<void> {
    await this.#ask("POST", "/window", { handle });
  }

  async tab(): Promise<string> {
    return await this.#ask("GET", "/window") as string;
  }

  /** Closes all tabs but this one. */
  async clear(first: string): Promise<void> {
    for (const tab of await this.#ask("GET", "/window/handles") as string[]) {
      await this.switchTo(tab);
      if (tab !== first) await this.#ask("DELETE", "/window");
    }
    await this.switchTo(first);
  }

  /** The errors that the console told since last asked: only in Chromium. */
  async errors(): Promise<string[]> {
    const entries = await this.#ask("POST", "/se/log", { type: "browser" }) as { level: string; message: string }[];
    return entries.filter(({ level }) => level === "SEVERE").map(({ message }) => message);
  }

  /** A picture, as PNG. */
  async screenshot(): Promise<Uint8Array<ArrayBuffer>> {
    return Uint8Array.fromBase64(await this.#ask("GET", "/screenshot") as string);
  }
}

const ENTER = "\uE007", ESCAPE = "\uE00C", SHIFT = "\uE008", BACKSPACE = "\uE003", UP = "\uE013", DOWN = "\uE015";

/** The browsers that are open: the first test that needs one opens it. */
const opened = new Map<keyof typeof BROWSERS, Promise<Browser>>();

Deno.test.afterAll(async () => {
  await Promise.all([...opened.values()].map(async (browser) => await (await browser).close()));
});

/** What a test of the page has at hand. */
interface Page extends Pick<Browser, "run" | "until" | "type" | "click" | "press"> {
  browser: Browser;
  chat: Awaited<ReturnType<typeof startChat>>;
  url: string;
  /** Opens the page, or the one at another address, and joins with this name. */
  enter(name: string, address?: string): Promise<void>;
  /** Types a message and sends it with Enter. */
  say(text: string): Promise<void>;
  /** Someone without a browser, who joined. */
  guest(username: string): Promise<Client>;
}

interface PageTest extends ChatOptions {
  /** Where it runs. Default: Chromium. */
  browsers?: (keyof typeof BROWSERS)[];
}

const BOTH: PageTest = { browsers: ["Chromium", "WebKit"] };

let pages = 0; // tests in Chromium so far

/** A test in the browser. It fails with any error of the page's script and any violation of its policy. */
function pageTest(
  name: string,
  body: (page: Page) => Promise<void>,
  { browsers = ["Chromium"], ...options }: PageTest = {},
): void {
  for (const kind of browsers) {
    const part = kind === "Chromium" ? `Chromium${1 + ++pages % 2}` : kind;
    if (PART && PART !== part) continue;
    Deno.test({
      name: `page: ${name}${kind === "Chromium" ? "" : `, in ${kind}`}`,
      ignore: BROWSERS[kind].missing,
      fn: () => inBrowser(kind, body, options),
      sanitizeOps: false, // the browser outlives the test
      sanitizeResources: false,
    });
  }
}

async function inBrowser(kind: keyof typeof BROWSERS, body: (page: Page) => Promise<void>, options: ChatOptions) {
  if (!opened.has(kind)) opened.set(kind, Browser.open(kind));
  const browser = await opened.get(kind)!, first = await browser.tab();
  const guests: Client[] = [];
  await using chat = await start(options);
  const url = `http://127.0.0.1:${chat.addr.port}/`;
  const page: Page = {
    browser,
    chat,
    url,
    run: (...look) => browser.run(...look),
    until: (...look) => browser.until(...look),
    type: (...what) => browser.type(...what),
    click: (name) => browser.click(name),
    press: (...keys) => browser.press(...keys),
    async enter(name, address = url) {
      await browser.goTo(address);
      await browser.until(({ status }) => status === "Connected");
      await browser.run((page) => {
        const field = page.field("Your name");
        if (!page.isShown(field)) page.one("#me").click();
        field.value = "";
      });
      await browser.type("Your name", name + ENTER);
      await browser.until(({ status, words }) =>
        status === "Connected" && words.includes("(you)") && !words.includes("No name yet")
      );
    },
    say: (text) => browser.type("Message", text + ENTER),
    async guest(username) {
      guests.push(await Client.open(chat, { username }));
      return guests.at(-1)!;
    },
  };
  await (kind === "Chromium" ? browser.look(1100, 800) : browser.resize(1100, 800));
  try {
    await body(page);
    const errors = kind === "Chromium" ? await browser.errors() : [];
    assertEquals(errors.filter((message) => !/WebSocket connection to|healthz|beforeunload/.test(message)), []);
  } finally {
    if (kind === "Chromium") await browser.errors();
    await browser.clear(first);
    for (const guest of guests) await guest[Symbol.asyncDispose]();
  }
}

// ──────────────────────────────────────────────────── The page ────────────────────────────────────────────────────

test("page: comes in one request of at most 14,336 bytes", async () => {
  await using chat = await start();
  using raw = await Raw.connect(chat.addr.port, "GET / HTTP/1.1", "Host: chat.test", "Accept-Encoding: br, gzip");
  const head = await raw.head();
  assertMatch(head, /^HTTP\/1.1 200 [^]*\r\ncontent-encoding: (gzip|br)\r\n/i);
  const size = Number(head.match(/\r\ncontent-length: (\d+)/i)![1]);
  assert(size > 0 && size <= 14_336, `${size} bytes`);
  const html = await Deno.readTextFile(PAGE);
  assertEquals(html.match(/<(style|script)\b/g), ["<style", "<script"]);
  assert(!/\s(style|on\w+|src)=/.test(html.replace(/<script[^]*<\/script>/, "")));
});

pageTest("shows markup as text", async ({ run, guest, enter, until, say }) => {
  const markup = `<img src=x onerror="hacked=1"><script>hacked=1</script>&amp;<b>`;
  const mallory = await guest("<b>Mallory</b>");
  await mallory.say(markup);
  await enter("Ada");
  await until((page, markup) => page.texts.includes(markup), markup);
  await say(markup);
  await until(
    ({ isSettled, texts }, markup) => isSettled && texts.filter((text) => text === markup).length === 2,
    markup,
  );
  assertEquals(await run(({ log }) => log.querySelector("bdi")!.textContent), "<b>Mallory</b>");
  assertEquals(await run(({ log }) => log.querySelectorAll("img, script, bdi *").length), 0);
  assertEquals(await run(() => "hacked" in globalThis), false);
});

pageTest("links http and https addresses and nothing else", async ({ run, guest, enter, until }) => {
  const ada = await guest("Ada");
  await ada.say(
    "javascript:alert(1) data:text/html,x JaVaScRiPt://x/%0aalert(1) file:///etc/passwd",
    "See https://a.example/x_(y), (http://b.example/?q=1) and HTTPS://C.example!",
    "http:// https://% https://a.example/\u202egnp.exe https://a.example\u202egnp.exe",
  );
  await enter("Grace");
  await until(({ texts }) => texts.length === 3);
  const links = await run(({ log }) =>
    [...log.querySelectorAll("a")].map((a) => [a.textContent, a.target, a.rel, a.protocol.replace("s:", ":")])
  );
  const shown = [
    "https://a.example/x_(y)",
    "http://b.example/?q=1",
    "HTTPS://C.example",
    "https://a.example/",
    "https://a.example",
  ];
  assertEquals(links, shown.map((text) => [text, "_blank", "noopener noreferrer", "http:"]));
});

pageTest("takes no name made of control characters", async ({ browser, url, run, type, until }) => {
  await browser.goTo(url);
  await run((page) => page.field("Your name").value = "\u202e\u200b\u0007");
  await type("Message", `Hi${ENTER}`);
  // Its room is shown meanwhile, and the message waits.
  await until((page) =>
    page.status === "Connected" && page.field("Your name").ariaInvalid === "true" &&
    /another name/.test(page.words) && page.texts.join() === "Hi" && !page.isSettled
  );
  await browser.reload();
  await until(({ status, field, isShown }) => status === "Connected" && isShown(field("Your name")));
  // Nor is anyone locked out whose name was kept and is refused: this one becomes longer when it is normalised.
  await run(() => {
    for (const storage of [localStorage, sessionStorage]) storage["chat.name"] = JSON.stringify("\ufb2c".repeat(20));
  });
  await browser.reload();
  await until((page) => page.status === "Connected" && page.field("Your name").ariaInvalid === "true");
  await run((page) => page.field("Your name").value = "");
  await type("Your name", `A\u202ed\u200ba${ENTER}`);
  await until(({ people, button, isSettled, texts }) =>
    people.join() === "Ada" && button("Ada") && isSettled && texts.join() === "Hi"
  );
});

pageTest("holds hostile texts in their place", async ({ browser, run, guest, enter, until }) => {
  const long = ["W", "﷽", "\u{1f469}\u200d\u{1f680}", "@", "`", "https://a.example/)"].map((text) =>
    text.repeat(2000).slice(0, 2000)
  );
  const mallory = await guest("W".repeat(40));
  await mallory.say(...long, "\u202eright to left\u202e", "\u202dover\u2067ride");
  await enter("Ada");
  await until(({ texts }) => texts.length === 8);
  for (const width of [1100, 390, 320]) {
    await browser.look(width, 640);
    assertEquals(await run(({ sideways }) => sideways), [], `${width} px`);
  }
  assert(
    await run(({ all }) =>
      all("[role=log] .text, [role=log] bdi").every((node) => getComputedStyle(node).unicodeBidi.startsWith("isolate"))
    ),
  );
});

pageTest("shows what is nothing but markup without a thousand elements", async ({ run, guest, enter, until }) => {
  await enter("Ada");
  const eve = await guest("Eve");
  const repeated = ["@-", "@Eve ", "`a`", "```a```", "```\n", "**a**", "_**a**_ ", "**_a_ ", "> a\nb\n", "http://a "];
  const texts = repeated.map((text) => text.repeat(2000 / text.length));
  await eve.say(`**${"_a_ ".repeat(400)}**`, ...texts);
  await until(({ articles }, length) => articles.length === length, texts.length + 1);
  const sizes = await run(({ articles }) => articles.map((node) => node.querySelectorAll("*").length));
  assert(Math.max(...sizes) < 300, `${sizes}`);
  assert(await run(({ texts }, all) => texts.includes(all.trim()), texts[0]));
});

pageTest(
  "shows long texts of other scripts in pieces, since they may take a browser long",
  async ({ run, guest, enter, until }) => {
    await enter("Ada");
    const eve = await guest("Eve");
    const long = ["\u0f00", "a\u05d0", "\u0f00\u00a0", "👩‍🚀", "\u0600\u0d4e", "\u0628\u0e01 "].map((text) =>
      text.repeat(2000 / text.length)
    );
    const texts = [...long, `\`${long[0].slice(2)}\``, `https://chat.test/${long[0].slice(20)}`];
    await eve.say(...texts, "short words ".repeat(160));
    await until(({ articles }, length) => articles.length === length, texts.length + 1);
    const shown = await run(({ articles }) => articles.map((node) => node.querySelector(".text")!.textContent));
    assertEquals(
      shown.map((text) => text?.trim()),
      [...texts, "short words ".repeat(160)].map((text) => text.replaceAll("`", "").trim()),
    );
    const pieces = await run(({ articles }) =>
      articles.map((node) => {
        const walk = document.createTreeWalker(node.querySelector(".text")!, NodeFilter.SHOW_TEXT), pieces = [];
        while (walk.nextNode()) pieces.push(walk.currentNode.textContent!);
        return pieces.filter(Boolean);
      })
    );
    const longest = pieces.map((pieces) => Math.max(...pieces.map((piece) => piece.length)));
    assertEquals(longest.map((units) => units > 60), [...texts.map(() => false), true]);
    for (const piece of pieces[3]) assertMatch(piece, /^(👩‍🚀)+$/);
  },
);

pageTest("shows quotes of letters that run both ways in time", async ({ guest, enter, until }) => {
  await enter("Ada");
  const eve = await guest("Eve");
  await eve.say(...count(1, 15).map((number) => `> ${"\u0628\u0e01".repeat(990)}\n${number}`)); // each took 1.6 s once
  await until(({ articles }) => articles.length === 15);
}, BOTH);

pageTest("draws no more in one frame than it can", async ({ run, guest, enter, say, until }) => {
  await enter("Ada");
  await run(({ kept }) => {
    kept.seen = [];
    const lengthOf = (node: Node) => (node as Element).matches?.(".row, .text") ? node.textContent!.length : 0;
    const count = (changes: MutationRecord[]) =>
      kept.seen.push(
        changes.flatMap(({ addedNodes }) => [...addedNodes]).reduce((sum, node) => sum + lengthOf(node), 0),
      );
    new MutationObserver(count).observe(document.querySelector("#rows")!, { childList: true, subtree: true });
  });
  const eve = await guest("Eve");
  await eve.say("Hi");
  await until(({ texts }) => texts.at(-1) === "Hi");
  await eve.say(...count(1, 30).map((number) => `@Bob Smith ${"word ".repeat(280)}${number}`));
  await until(({ texts }) => texts.at(-1)?.endsWith(" 30"));
  await until(({ articles }) => articles.length === 31);
  assert(await run(({ kept }) => Math.max(...kept.seen)) < 2100); // with names and times
  await run(({ kept }) => kept.seen = []);
  await guest("Bob Smith");
  await until(({ people }) => people.length === 3);
  await say("Who is Bob?"); // and all who are meant are looked for anew
  await until(() => [...document.querySelectorAll("mark")].every((mark) => mark.textContent === "@Bob Smith"));
  assert(await run(({ kept }) => Math.max(...kept.seen)) < 2100);
});

pageTest("tells what is emoji only, however many ways there are to read it", async ({ run, guest, enter, until }) => {
  await enter("Ada");
  const eve = await guest("Eve");
  const fists = "✊🏽".repeat(12), begun = performance.now();
  await eve.say(...count(1, 90).map(() => `${fists}x`)); // each may take 0.4 s, and the page shows forty
  await eve.say(fists, "👩🏽‍❤️‍💋‍👨🏽 🇩🇪\n1️⃣", "✊🏽x", "1");
  await until(({ texts }) => texts.at(-1) === "1");
  const isEmoji = await run(({ articles }) => articles.slice(-5).map((node) => node.matches(".emoji")));
  assertEquals(isEmoji, [false, true, true, false, false]);
  assert(performance.now() - begun < DEADLINE, "it took too long");
}, BOTH);

pageTest("shows of a link where it leads", async ({ run, guest, enter, until }) => {
  await enter("Ada");
  const eve = await guest("Eve");
  const reversed = (text: string) => [...text].reverse().join("");
  await eve.say(
    `\u202ehttps://evil.example/${reversed("https://www.bank.example/")}`,
    "https://www.bank.example@evil.example/ https:///bank.example@evil.example/ https://\\/bank.example@evil.example/ https://\u0430.example/ https://bank.example\u2215.evil.example/ https://\u017fchool.example/",
    "HTTPS://A.example:443/@b\u00e9",
  );
  await until(({ texts }) => texts.length === 3);
  const links = await run(({ all }) =>
    all("[role=log] a").map((node) => {
      const range = document.createRange(), walk = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
      const lefts: number[] = [];
      for (let text; (text = walk.nextNode());) {
        for (let at = 0; at < text.textContent!.length; at++) {
          range.setStart(text, at);
          range.setEnd(text, at + 1);
          lefts.push(range.getBoundingClientRect().left);
        }
      }
      const left = [lefts[0], lefts.at(-1)!];
      return [(node as HTMLAnchorElement).href, left[0] < left[1]];
    })
  );
  assertEquals(links.map(([, forwards]) => forwards), [true, true]);
  assertEquals(links[1][0], "https://a.example/@b%C3%A9");
});

pageTest("lays out no row anew when one above it goes", async ({ run, enter, guest, until }) => {
  await enter("Ada");
  const slow = `_${"9\u0e36".repeat(30)}_ `, code = (text: string) => `\`\`\`\n${text}\n\`\`\``;
  const guests = [await guest("Grace"), await guest("Lin")], rows = 12;
  for (let i = 0; i < rows; i++) {
    const text = slow.repeat(25); // laid out slowly, as no font has it
    await guests[i % 2].say(i % 4 < 2 ? text : code(text));
    await until(({ texts }, length) => texts.length === length, i + 1);
  }
  const [all, few] = await run(({ one }) => {
    const list = one("#rows"), first = list.firstElementChild!, all: number[] = [], few: number[] = [];
    const layout = (times: number[], change: () => void) => {
      const begun = performance.now();
      change();
      list.getBoundingClientRect();
      times.push(performance.now() - begun);
    };
    for (let width = 50; width < 54; width++) { // another process may delay one layout, not each
      list.prepend(first);
      layout(all, () => list.style.width = `${width}%`);
      layout(few, () => first.remove());
    }
    return [Math.min(...all), Math.min(...few)];
  });
  assert(few < all / 4, `${few} of ${all} ms`);
}, BOTH);

pageTest("keeps the place of a reader when names above get tags", async ({ browser, chat, run, enter, until }) => {
  const username = "Lin Chen-Wu of Engineering", key = "the-key-of-the-first";
  {
    await using lin = await Client.open(chat, { username, key });
    await using grace = await Client.open(chat, { username: "Grace" });
    for (const text of numbered(30)) {
      await lin.say(text);
      await grace.say("between");
    }
  }
  await enter("Ada");
  await browser.resize(390, 844);
  await until(({ texts }) => texts.length > 39);
  await run(({ log }) => log.scrollTop -= 1500);
  const place = () =>
    run(({ articles, log }) => {
      const top = log.getBoundingClientRect().top;
      const seen = articles.find((node) => node.getBoundingClientRect().bottom > top + 50)!;
      return [seen.innerText.match(/message \d+|between/)?.[0], Math.round(seen.getBoundingClientRect().bottom)];
    });
  await until(({ texts, isAtEnd }) => texts.length === 60 && !isAtEnd);
  const before = await place(), height = await run(({ log }) => log.scrollHeight);
  await using other = await Client.open(chat, { username, key: "the-key-of-the-other" });
  await other.say("Hi");
  await until(({ log }, height) => log.scrollHeight > height + 200, height);
  assertEquals(await place(), before);
});

pageTest("compares no name with every message", async ({ chat, run, enter, until }) => {
  await enter("Ada");
  await run(({ kept }) => {
    const { normalize } = String.prototype;
    kept.seen = [0];
    String.prototype.normalize = function (form) {
      kept.seen[0]++;
      return normalize.call(this, form);
    };
  });
  for (const key of ["the-key-of-the-first", "the-key-of-the-other"]) {
    await using client = await Client.open(chat, { username: "Eve", key });
    for (const username of numbered(300, "Name")) client.send({ username, message: "Hi" });
    await client.say(key);
    await until(({ texts }, key) => texts.at(-1) === key, key);
  }
  const times = await run(({ kept }) => kept.seen[0]);
  assert(times < 5 * 600, `${times} times for 600 messages`);
});

pageTest("asks for a missing name and keeps the message", async ({ browser, url, run, type, click, press, until }) => {
  await browser.goTo(url);
  await until(({ status }) => status === "Connected");
  await type("Message", "Hello");
  await click("Send");
  await until((page) => document.activeElement === page.field("Your name") && /name first/.test(page.words));
  assertEquals(await run((page) => page.field("Message").value), "Hello");
  await press(..."Ada", ENTER);
  await until(({ isSettled, texts }) => isSettled && texts[0] === "Hello");
  assertEquals(await run((page) => page.field("Message").value), "");
}, BOTH);

pageTest("says so where nothing was said", async ({ browser, url, until }) => {
  await browser.goTo(url);
  await until(({ words }) => /first message/.test(words));
});

pageTest("lets two tabs with two names talk", async ({ browser, run, enter, until, say }) => {
  const first = await browser.tab();
  await enter("Ada");
  await browser.newTab();
  await enter("Grace");
  await say("Hi Ada");
  await until(({ isSettled, texts }) => isSettled && texts.includes("Hi Ada"));
  await browser.switchTo(first);
  await until(({ texts, people }) => texts.includes("Hi Ada") && people.join() === "Ada,Grace");
  assertEquals(await run(({ log }) => log.querySelector("bdi")!.textContent), "Grace");
  // In one browser both are the same person, whatever the names.
  assertEquals(await run(({ mine }) => mine.length), 1);
  await say("Hi Grace");
  await until(({ isSettled, mine }) => isSettled && mine.length === 2);
});

pageTest("groups the messages of one person, with times and days", async ({ run, guest, enter, until }) => {
  const [ada, grace] = [await guest("Ada"), await guest("Grace")];
  await ada.say("one", "two");
  await grace.say("three");
  await ada.say("four");
  await enter("Lin");
  await until(({ texts }) => texts.length === 4);
  const names = await run(({ all }) =>
    all("[role=log] bdi").filter((node) => node.parentElement!.offsetWidth > 1).map((node) => node.textContent)
  );
  assertEquals(names, ["Ada", "Grace", "Ada"]);
  assertEquals(await run(({ all }) => all("[role=log] .line").map((node) => node.textContent)), ["Today"]);
  // The letter stands beside the bubble, also where a line is above.
  const beside = await run(({ one }) => {
    const bubble = one(".bubble"), { left, top } = bubble.getBoundingClientRect();
    return document.elementFromPoint(left - 24, top + 8) === bubble;
  });
  assert(beside);
  const [short, exact] = await run(({ one }) => [one("time").textContent!, one("time").title]);
  assertMatch(short, /^\d?\d:\d\d/);
  assertMatch(exact, /20\d\d/);
});

pageTest("shows what is meant", async ({ run, guest, enter, until }) => {
  const ada = await guest("Ada Lovelace");
  await ada.say(
    "run `deno task`",
    "```ts\nlet a = 1;\n  a++;\n```",
    "\u{1f389}\u{1f44d}\u{1f3fd}",
    "@Grace and @Ada Lovelace, not me@grace.example",
    "\u05e9\u05dc\u05d5\u05dd",
  );
  await enter("Grace");
  await until(({ texts }) => texts.length === 5);
  const code = await run(({ all }) => all("[role=log] code").map((node) => node.textContent));
  assertEquals(code, ["deno task", "let a = 1;\n  a++;"]);
  const sizes = await run(({ all }) =>
    all("[role=log] .text").map((node) => parseFloat(getComputedStyle(node).fontSize))
  );
  assert(sizes[2] > 1.5 * sizes[0]);
  const marks = await run(({ all }) => all("mark").map((mark) => [mark.textContent, mark.className]));
  assertEquals(marks, [["@Grace", "me"], ["@Ada Lovelace", ""]]);
  assertEquals(await run(({ all }) => all(".to-me").length), 1);
  assert(await run(({ all }) => all("[role=log] .text")[4].matches(":dir(rtl)")));
});

pageTest("holds still for a reader and counts what is new", async ({ run, guest, enter, click, type, until }) => {
  const ada = await guest("Ada");
  await ada.say(...numbered(100));
  await enter("Grace");
  await until(({ texts, isAtEnd }) => texts.includes("message 100") && isAtEnd);
  await ada.say("at the end");
  await until(({ texts, isAtEnd }) => texts.includes("at the end") && isAtEnd);
  await run(({ log }) => log.scrollTop -= 300);
  await until(({ button }) => button("Newest"));
  const place = await run(({ log }) => log.scrollTop);
  await ada.say(...numbered(3, "new"));
  await until(({ button }) => button("3 new"));
  assertEquals(await run(({ log }) => log.scrollTop), place);
  await click("3 new");
  await until(({ isAtEnd, button, texts }) => isAtEnd && !button("new") && texts.at(-1) === "new 3");
  await until(({ one }) => one(".left").nextElementSibling!.textContent!.includes("new 1"));
  await run(({ log }) => log.scrollTop -= 300);
  await until(({ button }) => button("Newest"));
  await type("Message", ESCAPE);
  await until(({ isAtEnd }) => isAtEnd);
}, BOTH);

pageTest("loads older messages and keeps the place", async ({ run, guest, enter, until }) => {
  const ada = await guest("Ada");
  await ada.say(...numbered(450));
  await enter("Grace");
  await until(({ texts, isAtEnd }) => texts.at(-1) === "message 450" && isAtEnd);
  const top = ({ all }: InPage, text: string) =>
    all("[role=log] .text").find((node) => node.textContent === text)!.getBoundingClientRect().top;
  const [first] = await run(({ texts }) => texts) as string[];
  await run(({ log }) => log.scrollTop -= 300);
  await until(({ button }) => button("Newest"));
  await run(({ log }) => log.scrollTop = 100);
  const before = await run(top, first);
  await until(({ texts }, first) => texts[0] !== first, first);
  const after = await run(top, first);
  assert(Math.abs(after - before) < 2, `${before} became ${after}`);
  await until((page) => (page.log.scrollTop = 0, page.texts[0] === "message 1"));
  assert(await run(({ texts }) => texts.length <= 300));
  await until(({ words }) => /where it began/.test(words));
  // The way down shows each message in order.
  await until((page) => (page.log.scrollTop = 1e9, page.texts.at(-1) === "message 450" && page.isAtEnd));
  const shown = await run(({ texts }) => texts);
  assertEquals(shown, numbered(450).slice(-shown.length));
}, BOTH);

pageTest("misses no long message on the way down", async ({ run, guest, enter, until }) => {
  // Six characters each on the wire: then a page of the history has fewer messages than others.
  const ada = await guest("Ada");
  await ada.say(...numbered(520).map((text) => text + "\u0001".repeat(400)));
  await enter("Grace");
  await until(({ texts, isAtEnd }) => texts.length > 10 && isAtEnd);
  for (let oldest = 520; oldest > 1; oldest = await run(({ texts }) => parseInt(texts[0].slice(8)))) {
    await until(({ log, texts }, before) => (log.scrollTop = 0, parseInt(texts[0]?.slice(8)) < before), oldest);
  }
  await run(({ kept }) => kept.seen = []);
  await until(({ kept, log, texts }) => {
    log.scrollTop += 5000;
    kept.seen.push(...texts.map((text) => parseInt(text!.slice(8))));
    return kept.seen.includes(520);
  });
  assertEquals(await run(({ kept }) => new Set(kept.seen).size), 520);
  assert(!/no longer kept/.test(await run(({ words }) => words)));
});

pageTest("fills a tall window", async ({ browser, guest, enter, until }) => {
  await (await guest("Ada")).say(...numbered(150));
  await browser.look(1100, 4000);
  await enter("Grace");
  await until(({ texts, isAtEnd, log }) => texts.length > 80 && isAtEnd && log.scrollHeight > log.clientHeight);
});

pageTest("marks where this person had left", async ({ browser, run, guest, enter, url, until }) => {
  const ada = await guest("Ada");
  await ada.say("before");
  await enter("Grace");
  await until(({ texts }) => texts.includes("before"));
  await browser.goTo("about:blank");
  await ada.say("meanwhile", "later");
  await browser.goTo(url);
  await until(({ texts }) => texts.length === 3);
  await until(({ all }) =>
    all(".left").map((node) => node.parentElement!.querySelector(".text")!.textContent).join() === "meanwhile"
  );
  // What comes while it is looked at was not missed.
  await browser.reload();
  await until(({ texts }) => texts.length === 3);
  await ada.say("live");
  await until(({ texts }) => texts.length === 4);
  assertEquals(await run(({ all }) => all(".left").length), 0);
});

pageTest("keeps the name and the draft", async ({ browser, run, enter, type, url }) => {
  await enter("Ada");
  await type("Message", `half a${SHIFT}${ENTER}${SHIFT}thought`);
  await browser.reload();
  const fields = () => run(({ field }) => [field("Message").value, field("Your name").value]);
  await until(async () => (await fields()).join() === "half a\nthought,Ada");
  await browser.newTab();
  await until(async () => { // WebKit tells other tabs of what is stored a moment later
    await browser.goTo(url);
    return (await fields()).join() === ",Ada";
  });
}, BOTH);

pageTest("sends with Enter, but not while an input method composes", async (page) => {
  const { browser, run, type, press, enter, until } = page;
  await enter("Ada");
  await type("Message", "a");
  const height = await run((page) => page.field("Message").offsetHeight);
  await press(SHIFT + ENTER, "b");
  assertEquals(await run((page) => page.field("Message").value), "a\nb");
  assert(await run((page) => page.field("Message").offsetHeight) > height);
  await browser.cdp("Input.imeSetComposition", { text: "に", selectionStart: 1, selectionEnd: 1 });
  for (const init of [{ isComposing: true }, { keyCode: 229 }]) {
    await run((page, init) => {
      const event = new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...init });
      page.field("Message").dispatchEvent(event);
    }, init);
  }
  await browser.cdp("Input.insertText", { text: "日" });
  assertEquals(await run((page) => page.field("Message").value), "a\nb日");
  await press(ENTER);
  await until(({ isSettled, texts }) => isSettled && texts.join() === "a\nb日");
});

pageTest("counts near the limit and loses nothing over it", async ({ run, type, enter, until }) => {
  await enter("Ada");
  const fill = (length: number) =>
    run((page, length) => {
      page.field("Message").value = " " + "x".repeat(length);
      page.field("Message").dispatchEvent(new Event("input"));
      return page.words.match(/\d+ (left|over)/)?.[0];
    }, length);
  assertEquals([await fill(1500), await fill(1990), await fill(2003)], [null, "10 left", "3 over"]);
  await type("Message", ENTER);
  assertEquals(await run((page) => page.field("Message").value.length), 2004);
  await type("Message", BACKSPACE.repeat(3) + ENTER);
  await until(({ isSettled, texts }) => isSettled && texts[0]?.length === 2000);
}, BOTH);

pageTest("shows a refused message with the reason, and gives it back", async (page) => {
  const { browser, run, click, enter, until } = page;
  await enter("Ada");
  // The page itself sends nothing too long: this was left in its outbox.
  await run(() =>
    sessionStorage["chat.outbox"] = JSON.stringify([
      { id: "long", time: Date.now(), username: "Ada", message: "x".repeat(2001) },
      { id: "short", time: Date.now(), username: "Ada", message: "behind it" },
      { id: "other", time: Date.now(), username: "Ada", message: "y".repeat(2001) },
    ])
  );
  await browser.reload();
  await until(({ all, texts }) => all(".refused").length === 2 && texts.includes("behind it"));
  await until(({ one }) => /Not sent: more than 2000/.test(one("[role=alert]").innerText));
  await click("Discard");
  await until((page) => page.all(".refused").length === 1 && document.activeElement === page.field("Message"));
  const old = ({ one }: InPage) => Object.assign(one(".refused"), { old: true }) && true;
  await run(old);
  await click("Try again");
  await until(({ one, words }) => one(".refused") && !("old" in one(".refused")) && /more than 2000/.test(words));
  await click("Edit");
  await until((page) => page.isSettled && page.field("Message").value.length === 2001);
  assertEquals(await run(() => JSON.parse(sessionStorage["chat.outbox"])), []);
});

pageTest("sends again what is not answered", async ({ run, enter, until, say }) => {
  await enter("Ada");
  await run(({ kept }) => {
    kept.send = WebSocket.prototype.send;
    WebSocket.prototype.send = function (frame) {
      if (`${frame}`.includes("send_message")) WebSocket.prototype.send = kept.send;
      else kept.send.call(this, frame);
    };
  });
  await say("lost on the way");
  await until(({ isSettled, texts }) => isSettled && texts.join() === "lost on the way");
});

pageTest("sends by itself what came too fast", async ({ run, enter, until }) => {
  await enter("Ada");
  await run((page, texts) => {
    for (const text of texts) {
      page.field("Message").value = text;
      page.field("Message").form!.requestSubmit();
    }
  }, numbered(15));
  await until(({ isSettled, texts }) => isSettled && texts.length === 15);
  assertEquals(await run(({ texts }) => texts), numbered(15));
}, { rateLimit: 4 });

pageTest("outlives the server", async ({ browser, run, enter, until, say }) => {
  await using file = await temporary();
  const begin = (port: number) => start({ port, db: file.db });
  let chat = await begin(0);
  const address = `http://127.0.0.1:${chat.addr.port}/`;
  try {
    const first = await browser.tab();
    await enter("Ada", address);
    await say("before");
    await until(({ isSettled, texts }) => isSettled && texts.join() === "before");
    await run(({ articles }) => Object.assign(articles[0], { same: true }) && true);
    const second = await browser.newTab();
    await enter("Grace", address);
    await until(({ texts }) => texts.join() === "before");
    await chat.shutdown();
    await until(({ status }) => /^Offline, next try in \d+ s$/.test(status!));
    await say("meanwhile");
    await until(({ isSettled, log, words }) => !isSettled && /Sending/.test(log.innerText) && !/\(you\)/.test(words));
    chat = await begin(chat.addr.port);
    await until(({ isSettled, texts }) => isSettled && texts.join() === "before,meanwhile");
    await browser.switchTo(first);
    await until(({ status, texts }) => status === "Connected" && texts.join() === "before,meanwhile");
    assert(await run(({ articles }) => "same" in articles[0]), "drawn anew");
    await say("after");
    await browser.switchTo(second);
    await until(({ texts }) => texts.join() === "before,meanwhile,after");
  } finally {
    await chat.shutdown();
  }
}, BOTH);

pageTest("leaves the room when another page is shown in its place, until it is shown again", async (page) => {
  const { run, guest, enter, until } = page;
  await enter("Grace");
  const ada = await guest("Ada");
  await ada.has(({ users }) => users?.includes("Grace"));
  const turn = (type: string) =>
    run((_, type) => dispatchEvent(new PageTransitionEvent(type, { persisted: true })), type);
  await turn("pagehide");
  await ada.has(({ left }) => left?.includes("Grace"));
  await ada.say("meanwhile");
  await turn("pageshow");
  await until(({ status, texts }) => status === "Connected" && texts.join() === "meanwhile");
});

pageTest("keeps what another page of the tab wrote when it is shown again", async (page) => {
  const { run, enter, until } = page;
  await enter("Ada");
  await run(() => {
    sessionStorage.setItem("chat.draft", JSON.stringify("a longer draft"));
    const entry = { seq: 0, id: "by-the-other-page", time: Date.now(), username: "Ada", message: "by the other page" };
    sessionStorage.setItem("chat.outbox", JSON.stringify([entry]));
    dispatchEvent(new PageTransitionEvent("pagehide", { persisted: true }));
    dispatchEvent(new PageTransitionEvent("pageshow", { persisted: true }));
  });
  await until(({ texts, isSettled, field }) =>
    isSettled && texts.join() === "by the other page" && field("Message").value === "a longer draft"
  );
});

pageTest("tells nobody a name that is not finished", async ({ browser, url, run, type, guest, until }) => {
  const ada = await guest("Ada");
  await browser.goTo(url);
  await until(({ status }) => status === "Connected");
  await type("Your name", "Gr");
  await run((page) => page.field("Your name").dispatchEvent(new FocusEvent("blur"))); // another window is looked at
  await type("Your name", "ace");
  await run((page) => page.field("Message").focus());
  await ada.has(({ joined }) => joined?.includes("Grace"));
  assertEquals(ada.events.flatMap(({ joined = [] }) => joined).filter((name) => name.startsWith("Gr")), ["Grace"]);
});

pageTest("starts over in another room", async ({ browser, chat, click, enter, until, say }) => {
  await enter("Ada");
  await say("in the first room");
  await until(({ isSettled, texts }) => isSettled && texts.length === 1);
  await chat.shutdown();
  await until(({ status }) => /Offline/.test(status!));
  await say("kept");
  const other = await start({ port: chat.addr.port });
  try {
    await click("Try now").catch(() => {}); // it may have tried by itself
    await until(({ isSettled, texts }) => isSettled && texts.join() === "kept");
  } finally {
    await browser.goTo("about:blank");
    await other.shutdown();
  }
}, BOTH);

pageTest("notices a dead connection on coming back", async ({ run, enter, until }) => {
  await enter("Ada");
  // From here on nothing that the page sends arrives, as on a laptop that slept.
  await run(({ kept }) => {
    kept.send = WebSocket.prototype.send;
    WebSocket.prototype.send = function () {
      this.onclose = () => {};
      WebSocket.prototype.send = () => {};
    };
    const now = Date.now, begun = now();
    Date.now = () => begun + 4 * (now() - begun); // time flies
  });
  await until(({ kept, status }) => {
    dispatchEvent(new Event("online"));
    return status !== "Connected" && (WebSocket.prototype.send = kept.send);
  });
  await until(({ status }) => status === "Connected");
});

pageTest("sends what had to wait, and tests a silent connection, when its clock was set back", async (page) => {
  const { run, enter, say, until } = page;
  await enter("Ada");
  for (const text of numbered(6)) await say(text); // more than may be sent at once
  await run(({ kept }) => {
    const now = Date.now;
    Date.now = () => now() - 3_600_000;
    const { send } = WebSocket.prototype;
    kept.heard = [];
    WebSocket.prototype.send = function (frame) {
      kept.heard.push(`${frame}`);
      send.call(this, frame);
    };
  });
  await until(({ isSettled, texts }) => isSettled && texts.length === 6);
  await run(({ kept }) => {
    const now = Date.now;
    Date.now = () => now() - 3_600_000;
    kept.heard = [];
  });
  await until(({ kept }) => kept.heard.some((frame) => frame.includes("ping")));
}, { rateLimit: 1 });

pageTest("shows who is here and who types", async ({ browser, type, click, press, guest, enter, until }) => {
  await enter("Grace");
  const ada = await guest("Ada");
  await until(({ people, words }) => people.join() === "Grace,Ada" && /Ada came/.test(words) && /2 here/.test(words));
  ada.send({ event: "typing" });
  await until(({ words }) => /Ada is typing/.test(words));
  await ada.say("done");
  await until(({ words }) => !/is typing/.test(words));
  const heard = ada.next(({ event, username }) => event === "typing" && username === "Grace");
  await type("Message", "hm");
  await heard;
  await ada[Symbol.asyncDispose]();
  await until(({ people, words }) => people.join() === "Grace" && /Ada left/.test(words));
  await browser.look(390, 700);
  await click("1 here");
  await until(({ words }) => /\(you\)/.test(words));
  await press(ESCAPE);
  await until(({ words }) => !/\(you\)/.test(words));
});

pageTest("keeps the names in a notice when it is drawn again", async ({ run, guest, enter, until }) => {
  await enter("Grace");
  const [ada, bob] = [await guest("Ada"), await guest("Bob")];
  await until(({ people }) => people.length === 3);
  await run(({ kept }) => {
    kept.heard = [];
    const look = () => kept.heard.push(...document.body.innerText.match(/^\s*left$/m) ?? []);
    new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
  });
  await ada[Symbol.asyncDispose]();
  await until(({ words }) => /Ada left/.test(words));
  for (const text of ["one", "two", "three"]) {
    await bob.say(text);
    await until(({ texts }, text) => texts.includes(text), text);
  }
  assertEquals(await run(({ kept }) => kept.heard), []);
});

pageTest("has the name of the room", async ({ run, guest, enter, until }) => {
  const ada = await guest("Ada");
  await enter("Grace");
  assertEquals(await run(({ one }) => [document.title, one("h1").innerText]), ["<Tea> & $&", "<Tea> & $&"]);
  await run(() => document.hasFocus = () => false);
  await ada.say("one");
  await until(() => document.title === "(1) <Tea> & $&");
}, { title: "<Tea> & $&" });

pageTest("counts a reader without a name", async ({ browser, run, guest, url, until }) => {
  const ada = await guest("Ada");
  await browser.goTo(url);
  await until(({ people, words }) => people.join() === "Ada" && /2 here/.test(words));
  // That one more is this reader.
  assertEquals(await run(({ one }) => one("aside li").innerText), "No name yet (you)");
  assert(!/more/.test(await run(({ words }) => words)));
  await guest("Item 10");
  await guest("Item 9");
  await until(({ people }) => people.join() === "Ada,Item 9,Item 10");
  await ada[Symbol.asyncDispose]();
  await until(({ words }) => /Ada left/.test(words));
});

pageTest("counts in the title while it is not looked at", async ({ run, guest, enter, until }) => {
  const ada = await guest("Ada");
  await ada.say("before");
  await enter("Grace");
  await until(({ texts }) => texts.length === 1);
  const hide = (hidden: boolean) =>
    run((_, hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }, hidden);
  await hide(true);
  await ada.say("one", "two");
  await until(() => document.title.startsWith("(2)"));
  await hide(false);
  await until(() => document.title === "Chat");
  await until(({ one }) => one(".left"));
});

pageTest("has new messages read out, and not the history", async ({ run, guest, enter, until }) => {
  const ada = await guest("Ada");
  await ada.say("history");
  await enter("Grace");
  await until(({ texts }) => texts.length === 1);
  await run(({ kept, one }) => {
    const news = one("#news");
    kept.heard = [];
    new MutationObserver(() => kept.heard.push(news.textContent!)).observe(news, { childList: true, subtree: true });
  });
  await ada.say("news");
  await until(({ kept }) => kept.heard.join() === "Ada: news");
  assertEquals(await run(({ one }) => one("#news").ariaLive), "polite");
});

pageTest("sends a message also if the name was written last", async ({ browser, url, type, click, until }) => {
  await browser.goTo(url);
  await type("Message", "Hello");
  await type("Your name", "Ada");
  await click("Send");
  await until((page) =>
    page.isSettled && page.texts.join() === "Hello" && document.activeElement === page.field("Message")
  );
  // The name is a button now, and the button opens the field.
  await until(({ isShown, field }) => !isShown(field("Your name")));
  await click("Ada");
  await until(({ isShown, field }) => isShown(field("Your name")) && field("Your name").value === "Ada");
}, BOTH);

pageTest("knows its own messages by their tag, whatever the names", async (page) => {
  const { browser, run, click, type, guest, enter, say, until } = page;
  await enter("Jose\u0301");
  await until(({ words }) => words.includes("Jos\u00e9 (you)"));
  await say("mine");
  await until(({ isSettled, mine }) => isSettled && mine.length === 1);
  const other = await guest("Jos\u00e9"), third = await guest("Ada");
  await other.say("not mine");
  await third.say("hers");
  await until(({ texts }) => texts.length === 3);
  const isRight = ({ mine }: InPage) => mine.map((node) => node.textContent).join() === "mine";
  assert(await run(isRight));
  // Who has that name as well is marked, and has another colour.
  const marks = await run(({ all }) => all("[role=log] small").map((node) => node.textContent));
  assertEquals(marks.map((mark) => mark!.length > 0), [true, true, false]);
  const hues = await run(({ all }) => all(".bubble").map((node) => node.style.getPropertyValue("--hue")));
  assert(hues[0] !== hues[1]);
  // Taking a name that is here says so.
  await click("Jos");
  await run((page) => page.field("Your name").value = "");
  await type("Your name", `ada${ENTER}`);
  await until(({ one, button }) => /You are ada now; someone else/.test(one("#wrong").innerText) && button("ada"));
  assert(await run(isRight));
  await browser.reload();
  await until(({ texts }) => texts.length === 3);
  await until(isRight);
});

pageTest("tells apart those whose names look the same", async ({ chat, run, enter, until }) => {
  await enter("Lin");
  const alike = [
    ["\u0b95\u0bcb", "\u0b95\u0bbe\u0bc7"], // one vowel in two parts
    ["Ada", "\u0410d\u0430", "\u0391da", "\uff21da", "A\u0335da", "A\u0335\u0335da"],
    ["AI", "Al"],
    ["Nina", "\u039dina", "N\u0131\u0308na"],
    ["Zoe\u0308", "Zo\u0451"],
    ["\u01f0o", "\u0237\u030co"],
    ["\u0249\u0301o", "\u025f\u0301o"],
    ["Carl", "\u03f9arl", "\u1d04arl", "\u04aaarl"],
    ["Marc", "Mar\u03f2"],
    ["\u041f\u0430\u0432\u0435\u043b", "\u03a0\u0430\u0432\u0435\u043b"],
    ["Hugo", "\u04bau\u0261\u1d0f"],
    ["\u0413\u0440\u0438\u043c\u0442\u0432", "\u0393\u0440\u0438\u1d0d\u1d1b\u0299"],
    ["\u0410\u043d\u044f", "\u0410\u029c\u044f"],
    ["Jean-Luc O'Neil", "Jean\u2010Luc O\u2019Neil", "Jean\u2010Luc O\u02bcNeil"],
  ];
  const names = [
    ...alike.flat(),
    "Ada s-BWkdfZIS\u{1d5dd}H",
    "Ada s\u2017BWkdfZISBH",
    "Ada s-BWkdfZISBH \u02d1",
    "Grace",
    "Ada s-BWkdfZISBH",
  ];
  const tags: (string | undefined)[] = [];
  for (const [i, username] of names.entries()) {
    await using client = await Client.open(chat, { username, key: `the-key-of-number-${i}` });
    tags.push((await client.say(`by ${i}`)).tag);
  }
  await until(({ texts }, length) => texts.length === length, names.length);
  const marks = await run(({ all }) => all("[role=log] small").map((node) => node.textContent!.trim()));
  assertEquals(marks, tags.with(-2, "")); // the last looks like the first with its tag
  const hues = await run(({ all }) => all(".bubble").map((node) => node.style.getPropertyValue("--hue")));
  assertEquals(new Set(hues.slice(2, 6)).size, 4);
});

pageTest("tells the room the last of many names", async ({ browser, run, enter, guest, until }) => {
  const ada = await guest("Ada");
  await enter("Name 0");
  await run((page, names) => {
    const rename = (name: string) => {
      page.one("#me").click();
      page.field("Your name").value = name;
      page.field("Your name").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
    };
    names.forEach((name, i) => setTimeout(rename, 40 * i, name));
  }, numbered(14, "Name"));
  await until(({ people, words }) => people.join() === "Name 14,Ada" && /Name 14 \(you\)/.test(words));
  ada.send({ event: "join", username: "Grace" });
  await until(({ words }) => /Grace came, Ada left/.test(words));
  await browser.goTo("about:blank");
}, { rateLimit: 20 });

pageTest("works where storage is forbidden", async ({ browser, run, enter, say, type, until }) => {
  const source = `for (const storage of ["localStorage", "sessionStorage"]) {
    Object.defineProperty(self, storage, { get() { throw new DOMException("no", "SecurityError") } });
  }`;
  const script = await browser.cdp("Page.addScriptToEvaluateOnNewDocument", { source }) as { identifier: string };
  await enter("Ada");
  await say("all the same");
  await until(({ isSettled, mine }) => isSettled && mine.length === 1);
  await type("Message", "a draft");
  await run(() => dispatchEvent(new Event("pageshow"))); // as it is shown again
  assertEquals(await run((page) => page.field("Message").value), "a draft");
  await browser.cdp("Page.removeScriptToEvaluateOnNewDocument", script);
});

pageTest("asks before a message that waits is lost", async ({ run, chat, enter, say, until }) => {
  const asks = () => run(() => !dispatchEvent(new Event("beforeunload", { cancelable: true })));
  await enter("Ada");
  assertEquals(await asks(), false);
  await chat.shutdown();
  await until(({ status }) => /Offline|Connecting/.test(status!));
  await say("kept");
  assertEquals(await asks(), true);
});

pageTest("says when the server hangs", async ({ run, enter, say, until }) => {
  await enter("Ada");
  await run(() => {
    WebSocket.prototype.send = () => {};
    const now = Date.now, begun = now();
    Date.now = () => begun + 4 * (now() - begun); // time flies
  });
  await say("Hello?");
  await until(({ status }) => /No answer/.test(status!));
}, BOTH);

pageTest("says when the room is full", async ({ browser, guest, url, until }) => {
  await guest("Ada");
  await browser.goTo(url);
  await until(({ status }) => /^The room is full, next try in \d+ s$/.test(status!));
}, { maxClients: 1 });

pageTest("does not say that a room is full where a proxy refuses sockets", async ({ browser, url, run }) => {
  let asked = 0;
  await using proxy = Deno.serve({ port: 0, onListen() {} }, async (request) => {
    if (request.headers.has("upgrade")) return new Response("", { status: 403 });
    const { pathname } = new URL(request.url), answer = await fetch(new URL(pathname, url));
    if (pathname === "/healthz") asked++;
    return new Response(await answer.text(), { headers: { "content-type": "text/html" } });
  });
  await browser.goTo(`http://localhost:${proxy.addr.port}/`);
  await run(({ kept, one }) => {
    kept.heard = [];
    new MutationObserver(() => kept.heard.push(one("#state").textContent!)).observe(one("#state"), { childList: true });
  });
  await until(() => asked > 3);
  const said = await run(({ kept }) => kept.heard);
  assert(said.length > 0 && said.every((text) => /^(Offline|Connecting…)$/.test(text)), `${said}`);
});

pageTest(
  "lets the reader leave the end, however slowly",
  async ({ browser, run, guest, enter, type, press, click, until }) => {
    const ada = await guest("Ada");
    await ada.say(...numbered(60));
    await enter("Grace");
    await until(({ texts, isAtEnd }) => texts.at(-1) === "message 60" && isAtEnd);
    await browser.wheel(-3);
    await until(({ button }) => button("Newest"));
    const place = await run(({ log }) => log.scrollTop);
    await ada.say("more");
    await until(({ button }) => button("1 new"));
    assertEquals(await run(({ log }) => log.scrollTop), place);
    await click("1 new");
    await until((page) => page.isAtEnd && document.activeElement === page.field("Message"));
    // A second line, and a lower window, leave it at the end.
    await type("Message", "a");
    await press(SHIFT + ENTER, "b", "c", "d");
    await until(({ isAtEnd, button }) => isAtEnd && !button("Newest"));
    await ada.say("and more");
    await until(({ isAtEnd, texts }) => isAtEnd && texts.at(-1) === "and more");
    assert(await run((page) => page.field("Message").scrollHeight <= page.field("Message").clientHeight));
    await browser.resize(700, 600);
    await until(({ isAtEnd, button }) => isAtEnd && !button("Newest"));
    assert(await run(() => document.documentElement.scrollHeight <= document.documentElement.clientHeight));
    // Keys of the field scroll the log.
    await press("\ue00e");
    await until(({ button, isAtEnd }) => button("Newest") && !isAtEnd);
    await press("\ue00f");
    await until(({ isAtEnd }) => isAtEnd);
  },
  BOTH,
);

pageTest(
  "completes names, and answers with a quote",
  async ({ browser, run, guest, enter, type, press, click, until }) => {
    const ada = await guest("Ada Lovelace");
    await guest("Alan");
    await ada.say("**Bold** _and_ snake_case", ">:( second");
    await enter("Grace");
    await until(({ texts, people }) => texts.length === 2 && people.length === 3);
    assertEquals(await run(({ all }) => all("strong, em").map((node) => node.textContent)), ["Bold", "and"]);
    // What is typed anywhere goes into the message.
    await click("[role=log]");
    await press("@", "a");
    const chosen = ({ all }: InPage) =>
      all("[role=option]").map((node) => `${node.textContent} ${node.ariaSelected}`).join();
    await until((page) => page.all("[role=option]").length === 2);
    assertEquals(await run(chosen), "Ada Lovelace true,Alan false");
    await press(DOWN, UP, UP, "\uE004");
    assertEquals(await run((page) => page.field("Message").value), "@Alan ");
    await press("@", "a", ENTER, "o", "k");
    assertEquals(await run((page) => page.field("Message").value), "@Alan @Ada Lovelace ok");
    await click(".name bdi");
    assertEquals(await run((page) => page.field("Message").value), "@Alan @Ada Lovelace ok @Ada Lovelace ");
    await run((page) => page.field("Message").value = "");
    // From the keyboard: up to the last message, Enter.
    await run(({ log }) => log.focus());
    await press(UP, UP, ENTER);
    assertEquals(await run((page) => page.field("Message").value), "> Ada Lovelace: **Bold** _and_ snake_case\n");
    await press("y", "e", "s", ENTER);
    await until(({ isSettled, all }) => isSettled && all("blockquote").length === 1);
    assertEquals(await run(({ one }) => one("blockquote").textContent), "Ada Lovelace: Bold and snake_case");
    await type("Message", "x");
    await run(({ one }) => one(".reply").click());
    assertEquals(await run((page) => page.field("Message").value), "> Ada Lovelace: **Bold** _and_ snake_case\nx");
    await browser.goTo("about:blank");
  },
  BOTH,
);

pageTest("sends a message that ends in a name, whoever else has a longer one", async (page) => {
  const { guest, enter, until, say } = page;
  for (const name of ["Ada", "Adam", "Ada Lovelace", "\u0130pek"]) await guest(name);
  await enter("Grace");
  await until(({ people }) => people.length === 5);
  for (const text of ["a secret for @ada", "for @Ada "]) {
    await say(text);
    await until(({ isSettled, texts }, text) => isSettled && texts.at(-1) === text, text.trim());
  }
  await page.type("Message", "hello @\u0130p\uE004");
  assertEquals(await page.run((page) => page.field("Message").value), "hello @\u0130pek ");
});

pageTest("does not complete what is written after a name", async ({ run, guest, enter, type, until }) => {
  for (const name of ["Ada", "Ada ok, I owe Eve 100 euros", "Ada, I owe Eve 100 euros"]) await guest(name);
  await enter("Grace");
  await until(({ people }) => people.length === 4);
  for (const text of ["@Ada ok", "@Ada,"]) {
    await type("Message", `${text}${ENTER}`);
    await until(({ isSettled, texts }, text) => isSettled && texts.at(-1) === text, text);
    assertEquals(await run((page) => page.field("Message").value), "");
  }
});

pageTest("sends a message of characters that only some fonts have", async ({ enter, until, say }) => {
  await enter("Ada");
  await say("\uf8ff");
  await until(({ isSettled, texts }) => isSettled && texts.join() === "\uf8ff");
});

pageTest("replaces a key that cannot be one", async ({ browser, run, enter, until, say }) => {
  await enter("Ada");
  await run(() => localStorage.setItem("chat.key", "5"));
  await browser.reload();
  await until(({ status }) => status === "Connected");
  await say("Hi");
  await until(({ isSettled, texts }) => isSettled && texts.join() === "Hi");
});

pageTest("copies code, and the address of an empty room", async ({ run, guest, enter, click, until, url }) => {
  const ada = await guest("Ada");
  await enter("Grace");
  await run(({ kept }) => {
    kept.heard = [];
    addEventListener("copy", () => kept.heard.push(`${getSelection()}`));
  });
  await click("Copy address");
  await ada.say("```sh\nls\n  pwd\n```");
  await until(({ texts }) => texts.length === 1);
  await click("Copy code");
  assertEquals(await run(({ kept }) => kept.heard), [url, "ls\n  pwd"]);
  assertEquals(await run(({ texts }) => texts), ["ls\n  pwd"]);
});

pageTest("shows what is odd as well as it can", async ({ browser, run, guest, enter, until }) => {
  const ada = await guest("\u{1f1e9}\u{1f1ea} Ada");
  await ada.say("\u200b", numbered(1000, "").join("\n").slice(0, 1990), `Z${"\u0301".repeat(500)}`);
  await enter("W".repeat(40));
  await until(({ texts }) => texts.length === 3);
  const [letter, heights, inside] = await run(({ all, one, log }) => {
    const boxes = all(".bubble").map((node) => node.getBoundingClientRect());
    return [
      getComputedStyle(one(".bubble"), "::before").content,
      boxes.map(({ height }) => height),
      all(".words").every((node) => getComputedStyle(node).overflow === "hidden") && log.scrollWidth <= log.clientWidth,
    ];
  }) as [string, number[], boolean];
  assertMatch(letter, /\u{1f1e9}\u{1f1ea}/u);
  assert(heights[0] > 40 && heights[1] < 600 && heights[2] < 60 && inside, `${heights}`);
  // A message that is looked at unfolds.
  await run(({ articles }) => articles[1].focus());
  await until(({ articles }) => articles[1].offsetHeight > 2000);
  // A long name stands beside its letter.
  const beside = await run(({ one }) => {
    const [item, name] = [one("aside li"), one("aside li bdi")].map((node) => node.getBoundingClientRect());
    return name.left - item.left;
  });
  assert(beside > 24 && beside < 60, `${beside}`);
  await browser.look(390, 400);
  assert(await run(({ log }) => log.offsetHeight >= 240));
});

pageTest("keeps what is selected, and counts what comes without focus", async ({ run, guest, enter, say, until }) => {
  const ada = await guest("Ada");
  await ada.say("look at this @Grace");
  await enter("Grace");
  await until(({ all }) => all("mark.me").length === 1);
  const focus = (there: boolean) =>
    run((_, there) => {
      document.hasFocus = () => there;
      dispatchEvent(new Event(there ? "focus" : "blur"));
    }, there);
  await run(({ one }) => getSelection()!.selectAllChildren(one(".text")));
  await focus(false);
  await ada.say("one", "two");
  await until(({ texts }) => texts.length === 3 && document.title === "(2) Chat");
  await focus(true);
  await until(({ words }) => document.title === "Chat" && /New messages/.test(words));
  assertEquals(await run(() => `${getSelection()}`), "look at this @Grace");
  // Whoever answers has read it.
  await run(({ articles }) => articles[0].focus());
  await say("seen");
  await until(({ isSettled, words }) => isSettled && !/New messages/.test(words));
});

pageTest("reads out each message and what goes wrong", async ({ run, chat, guest, enter, type, until }) => {
  const ada = await guest("Ada");
  await enter("Grace");
  await run(({ kept, one, all }) => {
    kept.heard = [];
    assertLive(one("#news"));
    for (const region of all("[role=alert]")) assertLive(region);
    function assertLive(region: Element) {
      new MutationObserver(() => region.textContent && kept.heard.push(region.textContent))
        .observe(region, { childList: true, subtree: true, characterData: true });
    }
  });
  for (const times of [1, 2]) {
    await ada.say("again");
    await until(({ kept }, times) => kept.heard.length === times, times);
  }
  await run((page) => page.field("Message").value = "x".repeat(2001));
  await type("Message", ENTER);
  await until(({ kept }) => kept.heard.at(-1) === "Too long to send");
  assertEquals(await run(({ kept }) => kept.heard.slice(0, 2)), ["Ada: again", "Ada: again"]);
  assertEquals(await run(({ all }) => all("main form, [role=log] article").length > 2), true);
  await chat.shutdown();
});

pageTest(
  "asks at once for the password, and counts no visit as a guess",
  async ({ browser, run, url, type, until, say }) => {
    for (const _ of count(1, 8)) {
      await browser.goTo(url);
      await until((page) => document.activeElement === page.field("Password"));
    }
    // Nothing is behind it: not even Escape leads there.
    await type("Password", ESCAPE + ESCAPE);
    await until((page) => page.isShown(page.field("Password")));
    assertEquals(await run(() => document.elementFromPoint(20, 20)!.closest("header, main, aside")), null);
    await type("Password", `wrong${ENTER}`);
    await until(({ all }) => all("[role=alert]").some((node) => /not the password/.test(node.innerText)));
    await type("Password", `secret${ENTER}`);
    await until(({ status }) => status === "Connected");
    await browser.reload();
    await until(({ status }) => status === "Connected");
    await type("Your name", `Ada${ENTER}`);
    await say("I am in");
    await until(({ isSettled, texts }) => isSettled && texts[0] === "I am in");
  },
  { password: "secret", ...BOTH },
);

pageTest(
  "lets a thumb write lines, and prints the messages alone",
  async ({ browser, run, type, click, guest, enter, until }) => {
    await enter("Ada");
    await (await guest("Grace")).say(...numbered(40));
    await until(({ texts }) => texts.length === 40);
    await browser.cdp("Emulation.setEmulatedMedia", { media: "print" });
    const [log, bar] = await run((
      { log, isShown, one },
    ) => [
      log.scrollHeight <= log.clientHeight,
      ["header", "aside", "#strip", "form"].some((part) => isShown(one(part))),
    ]);
    assertEquals([log, bar], [true, false]);
    await browser.cdp("Emulation.setEmulatedMedia", { media: "" });
    await browser.cdp("Emulation.setTouchEmulationEnabled", { enabled: true });
    await browser.reload();
    await until(({ status }) => status === "Connected");
    await type("Message", `a${ENTER}b`);
    assertEquals(await run((page) => page.field("Message").value), "a\nb");
    await click("Send");
    await until(({ isSettled, texts }) => isSettled && texts.at(-1) === "a\nb");
    await browser.cdp("Emulation.setTouchEmulationEnabled", { enabled: false });
  },
  { rateLimit: 0 },
);

pageTest("offers notifications only where there are any", async ({ browser, run, guest, enter, until }) => {
  const pretend = async (body: string) => {
    const source = `self.Notification = class { static permission = "granted"; static requestPermission = async () =>
      "granted"; constructor(...args) { ${body} } }`;
    return (await browser.cdp("Page.addScriptToEvaluateOnNewDocument", { source }) as { identifier: string })
      .identifier;
  };
  const shown = await pretend("(self.heard ??= []).push(args[0])");
  try {
    const ada = await guest("Ada");
    await enter("Grace");
    for (const [value, said] of [["off", 0], ["mentions", 1], ["all", 2]] as const) {
      await run((page, value) => {
        document.hasFocus = () => false;
        const choice = page.one("#notify") as HTMLSelectElement;
        choice.value = value;
        choice.dispatchEvent(new Event("change"));
      }, value);
      await ada.say(`plain ${value}`, `@grace ${value}`);
      await until(({ texts }, value) => texts.at(-1) === `@grace ${value}`, value);
      const heard = await run(({ kept }) => kept.heard ?? []);
      assertEquals(heard, Array(said).fill("Ada · Chat"));
      await run(({ kept }) => kept.heard = []);
    }
  } finally {
    await browser.cdp("Page.removeScriptToEvaluateOnNewDocument", { identifier: shown });
  }
  const broken = await pretend(`throw new TypeError("Illegal constructor")`);
  try {
    await run(() => localStorage.clear());
    await browser.cdp("Page.addScriptToEvaluateOnNewDocument", { source: "Notification.permission = 'default'" });
    await browser.reload();
    await until(({ status, words }) => status === "Connected" && !/Notifications/.test(words));
  } finally {
    await browser.cdp("Page.removeScriptToEvaluateOnNewDocument", { identifier: broken });
  }
});

pageTest("fits any width in both themes", async ({ browser, run, guest, enter, until }) => {
  const ada = await guest("Ada");
  const wide = ["`code`", "```\n" + "x".repeat(300) + "\n```", "https://a.example/" + "x".repeat(300)];
  await ada.say(...numbered(30), ...wide);
  await enter("W".repeat(40));
  await until(({ texts }) => texts.length === 33);
  for (const theme of ["light", "dark"]) {
    for (const width of [1400, 1100, 390, 320]) {
      await browser.look(width, 560, theme);
      await until(({ isAtEnd }) => isAtEnd);
      const [sideways, small, bottom] = await run(({ sideways, all, isShown, button }) =>
        [
          sideways,
          all("button, input, textarea")
            .filter((node) => isShown(node) && Math.min(node.offsetWidth, node.offsetHeight) < 24)
            .map((node) => node.outerHTML),
          button("Send").getBoundingClientRect().bottom,
        ] as const
      );
      assertEquals([sideways, small], [[], []], `${width} px, ${theme}`);
      assert(bottom <= 560);
    }
    // The contrast of each colour that a name can have, on what it stands on.
    const contrast = await run(({ one }) => {
      const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
      const brush = canvas.getContext("2d")!;
      const light = (colour: string) => {
        brush.fillStyle = colour;
        brush.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map((n) =>
          n / 255 <= 0.04045 ? n / 255 / 12.92 : ((n / 255 + 0.055) / 1.055) ** 2.4
        );
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ratio = (a: string, b: string) =>
        (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
      const name = one(".first .name"), bubble = one(".first .bubble");
      let least = 99;
      for (let hue = 0; hue < 360; hue += 5) {
        bubble.style.setProperty("--hue", `${hue}`);
        const letter = getComputedStyle(bubble, "::before");
        const onBubble = ratio(getComputedStyle(name).color, getComputedStyle(bubble).backgroundColor);
        least = Math.min(least, onBubble, ratio(letter.color, letter.backgroundColor));
      }
      return least;
    });
    assert(contrast >= 4.5, `${contrast} in the ${theme} theme`);
  }
});

pageTest(
  "bears any spacing of letters, and colours that the reader chose",
  async ({ browser, run, guest, enter, until }) => {
    const ada = await guest("Ada");
    await ada.say(
      "short",
      "a few more words than would fit beside a time ".repeat(4).trim(),
      "\u12a0\u121b\u122d\u129b ".repeat(30),
    );
    await enter("Grace");
    await until(({ texts }) => texts.length === 3);
    const collisions = await run(({ all }) => {
      for (const node of all("[role=log] *")) {
        Object.assign(node.style, { letterSpacing: "0.12em", wordSpacing: "0.16em", lineHeight: "1.5" });
      }
      return all("[role=log] article").filter((article) => {
        const range = document.createRange(), time = article.querySelector("time")!.getBoundingClientRect();
        range.selectNodeContents(article.querySelector(".text")!);
        return [...range.getClientRects()].some(({ right, bottom, left, top }) =>
          right > time.left && left < time.right && bottom > time.top + 6 && top < time.bottom - 6
        );
      }).length;
    });
    assertEquals(collisions, 0);
    for (const [name, value] of [["forced-colors", "active"], ["prefers-contrast", "more"]]) {
      await browser.cdp("Emulation.setEmulatedMedia", { features: [{ name, value }] });
      const borders = await run(({ all }) =>
        all(".bubble, #send").map((node) => getComputedStyle(node)).map(({ borderTopWidth, borderTopColor }) =>
          `${borderTopWidth} ${borderTopColor}`
        )
      );
      const isFilled = value === "more"; // then the button stands out by its own colour
      assertEquals(borders.slice(0, isFilled ? 3 : 4).filter((border) => /^0|rgba\(.*, 0\)/.test(border)), [], name);
    }
  },
);

pageTest("stays usable at 5,000 messages a second", async ({ run, type, press, guest, enter, until, say }) => {
  const seconds = SOAK ? 10 : 1, batches = 50;
  const ada = await guest("Ada");
  await enter("Grace");
  await run(({ kept }) => {
    kept.longest = 0;
    new PerformanceObserver((list) => {
      for (const { duration } of list.getEntries()) kept.longest = Math.max(kept.longest, duration);
    }).observe({ type: "longtask" });
  });
  const flood = (async () => {
    const begun = performance.now();
    for (let i = 0; i < seconds * batches; i++) {
      const wait = begun + i * 1000 / batches - performance.now();
      if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait));
      for (const k of count(1, 5000 / batches)) {
        const message = `flood ${i * 5000 / batches + k}, with \`code\` and a few more words`;
        ada.send({ username: "Ada", message });
      }
    }
  })();
  await until(({ texts }) => texts.length > 10);
  await type("Message", "typed meanwhile");
  assertEquals(await run((page) => page.field("Message").value), "typed meanwhile");
  // Someone reads further up meanwhile, and comes back.
  await until((page) => (page.log.scrollTop = 0, page.button("new") || page.button("Newest")));
  const [held] = await run(({ texts }) => texts);
  await until((page, held) => (page.log.scrollTop = 0, page.texts[0] !== held), held);
  await press(ESCAPE);
  await until(({ isAtEnd }) => isAtEnd);
  assert(await run(({ texts }) => texts.length <= 310));
  await flood;
  await until(({ texts, isAtEnd }, last) => texts.at(-1)?.startsWith(last) && isAtEnd, `flood ${seconds * 5000},`);
  await say("");
  await until(({ isSettled, texts }) => isSettled && texts.at(-1) === "typed meanwhile");
  const longest = await run(({ kept }) => kept.longest);
  assert(!SOAK || longest < 100, `a task of ${longest} ms`);
});

// ──────────────────────────────────────────────────── Measuring ────────────────────────────────────────────────────

/** The chat as it is usually written: each message is sent to each socket, one at a time, and kept nowhere. */
function plainLoop(): void {
  const sockets = new Set<WebSocket>();
  const onListen = ({ port }: Deno.NetAddr) => console.log(`open: http://127.0.0.1:${port}/`);
  Deno.serve({ port: 0, hostname: "127.0.0.1", onListen }, (request) => {
    const { socket, response } = Deno.upgradeWebSocket(request);
    socket.onopen = () => sockets.add(socket);
    socket.onclose = () => sockets.delete(socket);
    socket.onmessage = ({ data }) => {
      const { username, message } = JSON.parse(data);
      const text = JSON.stringify({ event: "receive_message", time: Date.now(), username, message });
      for (const socket of sockets) if (socket.readyState === WebSocket.OPEN) socket.send(text);
    };
    return response;
  });
}

/** The same with Bun's publish and subscribe. */
const BUN = `
  const server = Bun.serve({
    port: 0,
    fetch: (request, server) => server.upgrade(request) ? undefined : new Response("a chat"),
    websocket: {
      open: (socket) => socket.subscribe("room"),
      message(_, data) {
        const { username, message } = JSON.parse(data);
        const text = JSON.stringify({ event: "receive_message", time: Date.now(), username, message });
        server.publish("room", text);
      },
    },
  });
  console.log("open: http://127.0.0.1:" + server.port + "/");`;

/** The seconds of CPU time that a process took. */
async function cpu(pid: number): Promise<number> {
  try {
    const fields = (await Deno.readTextFile(`/proc/${pid}/stat`)).replace(/^.*\) /, "").split(" ");
    return (Number(fields[11]) + Number(fields[12])) / 100;
  } catch {
    const { stdout } = await new Deno.Command("ps", { args: ["-o", "time=", "-p", `${pid}`] }).output();
    return decoder.decode(stdout).trim().split(":").reduce((sum, part) => 60 * sum + Number(part), 0);
  }
}

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** Messages delivered per second of the server's CPU time, while the room keeps so many in flight. */
async function measure(program: Program, joins: boolean, clients: number, senders: number, flight: number) {
  const text = "Hello, this is a message of forty chars.";
  const sockets: WebSocket[] = [];
  let delivered = 0, sent = 0;
  const send = () => {
    const socket = sockets[sent++ % senders];
    if (socket.readyState === WebSocket.OPEN) {
      socket.send(`{"event":"send_message","username":"user ${sent % senders}","message":"${text}"}`);
    }
  };
  const hear = (frame: string) => {
    let messages = 0;
    for (let at = frame.indexOf('"receive_'); at >= 0; at = frame.indexOf('"receive_', at + 100)) messages++;
    delivered += messages;
    return messages;
  };
  for (let i = 0; i < clients; i++) {
    const socket = new WebSocket(`ws://127.0.0.1:${program.addr.port}/`);
    await new Promise((resolve) => socket.onopen = resolve);
    socket.onmessage = ({ data }) => hear(data);
    if (joins) socket.send(`{"event":"join","username":"user ${i}"}`);
    sockets.push(socket);
  }
  sockets[0].onmessage = ({ data }) => { // it stands for all: what it has heard, all have or soon will
    for (let messages = hear(data); messages > 0; messages--) send();
  };
  for (let i = 0; i < flight; i++) send();
  await pause(1000);
  const [deliveredBefore, cpuBefore] = [delivered, await cpu(program.pid)];
  await pause(3000);
  const rate = (delivered - deliveredBefore) / (await cpu(program.pid) - cpuBefore);
  for (const socket of sockets) {
    socket.onmessage = null; // what arrives while it closes may have no data
    socket.close();
  }
  return rate;
}

/** Prints what this chat and others deliver. */
async function bench(): Promise<void> {
  await using file = await temporary();
  const env = { CHAT_LOG: "off", CHAT_DB: file.db, DENO_USE_WRITEV: "1" };
  const servers: [string, () => Program, boolean][] = [
    ["this chat", () => new Program(env), true],
    ["this chat, a frame a message", () => new Program(env), false],
    ["plain loop", () => new Program({ LOOP: `(${plainLoop})()` }, { shell: 'exec "$1" eval "$LOOP"' }), false],
  ];
  if (!await isMissing("bun", "--version")) {
    servers.push(["Bun, publish/subscribe", () => new Program({ BUN }, { shell: 'exec bun -e "$BUN"' }), false]);
  }
  console.log(
    "Millions of messages delivered per second of the server's CPU time; this chat writes each to its disk\n",
  );
  console.log(["clients".padEnd(20), ...servers.map(([name]) => name)].join("  "));
  for (const [clients, senders, flight] of [[32, 32, 512], [200, 50, 200], [1000, 100, 200]]) {
    const cells = [`${clients}, ${senders} sending`.padEnd(20)];
    for (const [name, begin, joins] of servers) {
      await using program = begin();
      await program.opened();
      const rate = await measure(program, joins, clients, senders, flight);
      cells.push((rate / 1e6).toFixed(2).padStart(name.length));
    }
    console.log(cells.join("  "));
  }
}

if (Deno.args[0] === "bench") await bench();

// deno task soak
if (SOAK) {
  test("while connections come, go, flood and stall, the memory of the server stays where it was", async () => {
    await using program = await Program.start({ CHAT_HISTORY: "1000", CHAT_RATE_LIMIT: "20", CHAT_TRUST_PROXY: "on" });
    // From many addresses, or few of these connections would be taken.
    const from = () => `2001:db8::${Math.floor(0x10000 * Math.random()).toString(16)}`;
    const memory = async () => {
      const { stdout } = await new Deno.Command("ps", { args: ["-o", "rss=", "-p", `${program.pid}`] }).output();
      return Math.round(Number(decoder.decode(stdout)) / 1024);
    };
    const text = "x".repeat(500), end = Date.now() + SOAK * 1000;
    const again = (many: number, work: (i: number) => Promise<unknown>) =>
      count(1, many).map(async (i) => {
        while (Date.now() < end) await work(i).catch(() => {});
      });
    const works = [
      again(10, async (i) => { // comes, says something, goes
        await using client = await Client.open(program, { username: `guest ${i}` }, { "x-forwarded-for": from() });
        await client.say(text);
      }),
      again(5, async (i) => { // floods until it is closed
        await using client = await Client.open(program, { username: `flood ${i}` }, { "x-forwarded-for": from() });
        while (!client.closed) {
          for (let k = 0; k < 50; k++) client.send({ username: `flood ${i}`, message: text });
          await pause(10);
        }
      }),
      again(20, async (i) => { // never reads
        using raw = await Raw.open(program.addr.port, `X-Forwarded-For: ${from()}`);
        await raw.frame({ event: "join", username: `stalled ${i}`, since: 0 });
        await pause(3000 + 200 * i);
      }),
      again(5, async () => { // breaks off in the middle
        using raw = await Raw.connect(program.addr.port, ...HANDSHAKE, `X-Forwarded-For: ${from()}`);
        await raw.frame("[", { length: 60_000 });
        await pause(50);
      }),
    ];
    await pause(10_000);
    const first = await memory();
    await Promise.all(works.flat());
    const last = await memory();
    console.log(`${first} MB after 10 s, ${last} MB after ${SOAK} s`);
    await using ada = await Client.open(program, { username: "Ada" });
    await ada.say("still here");
    assert(last < 1.3 * first + 20, `memory grew from ${first} to ${last} MB`);
  });
}
