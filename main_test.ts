/**
 * The tests: behaviour, through real sockets, files, processes and real browsers.
 *
 * @module
 */

/// <reference lib="dom" />

import { assert, assertEquals, assertMatch } from "@std/assert";
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

const PAGE = new URL("./index.html", import.meta.url);
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
      const changed = change(), seen = await look();
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

  constructor(url: string, options?: { client: Deno.HttpClient }) {
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
  ): Promise<Client> {
    const client = new Client(`ws://127.0.0.1:${port}/`);
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
  send(event: string | Uint8Array<ArrayBuffer> | object): void {
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
  ask(event: Parameters<Client["send"]>[0], test: (event: Received) => unknown = () => true): Promise<Received> {
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

const texts = (events: Received[]): string[] => events.map(({ message }) => message);
const seqs = (events: Received[]): number[] => events.map(({ seq }) => seq);
const count = (from: number, to: number): number[] => Array.from({ length: to - from + 1 }, (_, i) => from + i);
const numbered = (length: number, what = "message"): string[] => count(1, length).map((i) => `${what} ${i}`);

/** A folder that is gone with the test, and in it a file for a database. */
async function temporary(): Promise<AsyncDisposable & { db: string; folder: string }> {
  const folder = await Deno.makeTempDir();
  return { db: `${folder}/chat.db`, folder, [Symbol.asyncDispose]: () => Deno.remove(folder, { recursive: true }) };
}

/** The permissions that the start task gives. */
const FLAGS: string[] = JSON.parse(await Deno.readTextFile(new URL("deno.json", import.meta.url)))
  .tasks.start.command.match(/--allow-\S+/g);

/** The program itself, in a process of its own, with the permissions of the start task and any disk. */
class Program {
  /** What it printed. */
  output = "";
  readonly addr = { port: 0 };
  readonly #process: Deno.ChildProcess;
  readonly #read: Promise<unknown>;
  readonly #change = new Change();

  constructor(env: Record<string, string> = {}, flags = [...FLAGS, "--allow-read", "--allow-write"]) {
    const alone = flags.filter((flag) => flag.includes("=") ? !flags.includes(flag.split("=")[0]) : true);
    this.#process = new Deno.Command(Deno.execPath(), {
      args: ["run", "--no-prompt", ...alone, "main.ts"],
      env: { PORT: "0", CHAT_DB: ":memory:", CHAT_RATE_LIMIT: "0", ...env },
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const read = async (stream: ReadableStream<Uint8Array<ArrayBuffer>>) => {
      for await (const text of stream.pipeThrough(new TextDecoderStream())) {
        this.output += text;
        this.#change.now();
      }
    };
    this.#read = Promise.all([read(this.#process.stdout), read(this.#process.stderr)]);
  }

  /** Starts the program and resolves when it is open. */
  static async start(env?: Record<string, string>): Promise<Program> {
    const program = new Program(env);
    program.addr.port = Number((await program.says(/open: https?:\/\/\S+:(\d+)\//))[1]);
    return program;
  }

  get pid(): number {
    return this.#process.pid;
  }

  /** Resolves when the program has printed this. */
  says(pattern: RegExp): Promise<RegExpMatchArray> {
    return until(() => this.output.match(pattern), this.#change.next, () => `${pattern}\n${this.output}`);
  }

  /** Resolves with its status, when it has ended by itself. */
  async ended(): Promise<Deno.CommandStatus> {
    await this.#read;
    return await this.#process.status;
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
    await this.end("SIGKILL");
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
    assertMatch(await raw.head(), /^HTTP\/1.1 101 /);
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

  /** The head of an HTTP response. */
  async head(): Promise<string> {
    let head = "";
    while (!head.endsWith("\r\n\r\n") && await this.#read(1)) head += String.fromCharCode(this.#take(1)[0]);
    return head;
  }

  /** The next text, or the code of a close frame; undefined when the connection has ended. */
  async next(): Promise<string | number | undefined> {
    while (await this.#read(2)) {
      const short = this.#unread[1] & 127, start = short === 127 ? 10 : short === 126 ? 4 : 2;
      if (!await this.#read(start)) return undefined;
      const view = new DataView(this.#unread.buffer, this.#unread.byteOffset);
      const size = short === 127 ? Number(view.getBigUint64(2)) : short === 126 ? view.getUint16(2) : short;
      if (!await this.#read(start + size)) return undefined;
      const kind = this.#take(start)[0] & 15, body = this.#take(size);
      if (kind === 1) return decoder.decode(body);
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

// ──────────────────────────────────────────────────── The room ────────────────────────────────────────────────────

Deno.test("the page comes at /, and nothing else comes elsewhere", async () => {
  await using chat = await start();
  const ask = async (path: string, method = "GET") => {
    const response = await fetch(`http://127.0.0.1:${chat.addr.port}${path}`, { method });
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
});

Deno.test("a plain client gets a message a frame and nothing it did not ask for", async () => {
  await using chat = await start();
  await using plain = await Client.open(chat);
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.next(({ event }) => event === "presence");
  ada.send({ event: "typing" });
  for (let i = 1; i <= 50; i++) ada.send({ username: "Ada", message: `${i}` });
  await plain.until(() => plain.messages().length === 50);
  assertEquals(plain.frames.length, 50);
  assertEquals(texts(plain.events), count(1, 50).map(String));
});

Deno.test("what is wrong is refused, to its sender alone, and changes nothing", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  await using grace = await Client.open(chat);
  const ok = { event: "send_message", username: "Ada", message: "Hi", id: "ok" };
  const wrong: [string | Uint8Array<ArrayBuffer> | object, RegExp, string?][] = [
    ["not JSON", /must be JSON/],
    ["null", /JSON object/],
    ["[1]", /JSON object/],
    ["{}", /event must be/],
    [{ event: "shout" }, /event must be/],
    [{ event: "__proto__" }, /event must be/],
    [new Uint8Array(4), /must be text/],
    [{ ...ok, message: "" }, /message must be 1 to 2000/, "ok"],
    [{ ...ok, message: " \n\t " }, /message must be 1 to 2000/, "ok"],
    [{ ...ok, message: "x".repeat(2001) }, /message must be 1 to 2000/, "ok"],
    [{ ...ok, message: 5 }, /message must be 1 to 2000/, "ok"],
    [{ ...ok, message: undefined }, /message must be 1 to 2000/, "ok"],
    [{ ...ok, username: "x".repeat(41) }, /username must be 1 to 40/, "ok"],
    [{ ...ok, username: "\u200b\u202e\u0000" }, /username must be 1 to 40/, "ok"],
    [{ ...ok, username: undefined }, /username must be 1 to 40/, "ok"],
    [{ ...ok, id: "" }, /id must be 1 to 64/],
    [{ ...ok, id: "x".repeat(65) }, /id must be 1 to 64/],
    [{ ...ok, id: "a b" }, /id must be 1 to 64/],
    [{ ...ok, id: 7 }, /id must be 1 to 64/],
    [{ event: "join", username: " " }, /username must be 1 to 40/],
    [{ event: "join", username: "Ada", since: 1 }, /since is beyond/],
    [{ event: "join", username: "Ada", since: -1 }, /since must be a whole number/],
    [{ event: "join", username: "Ada", since: 0.5 }, /since must be a whole number/],
    [{ event: "join", username: "Ada", since: "0" }, /since must be a whole number/],
    [{ event: "history" }, /before must be a whole number/],
    [{ event: "history", before: "1" }, /before must be a whole number/],
  ];
  for (const [frame, reason, id] of wrong) {
    const error = await ada.ask(frame, ({ event }) => event === "error");
    assertMatch(error.error, reason);
    assertEquals(error.id, id);
  }
  assertMatch((await grace.ask({ event: "history", before: 1 }, () => true)).error, /join before/);
  assertMatch((await grace.ask({ event: "typing" }, () => true)).error, /join with a username/);
  assertEquals((await ada.say("Hi")).seq, 1);
  await grace.until(() => grace.messages().length === 1);
  assertEquals(grace.events.length, 3);
});

Deno.test("a name is cleaned, and a message is kept as it was typed", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat);
  const said = async (username: string, message: string) => {
    ada.username = username;
    const { username: name, message: text } = await ada.say(message);
    return [name, text];
  };
  assertEquals(await said(" A\u0000d\u200ba\u202e \n\t Love\u2028lace\u00ad ", "x"), ["Ada Love lace", "x"]);
  assertEquals(await said("Ada", "\n  a\n\n  b\u202e \u200b"), ["Ada", "a\n\n  b\u202e \u200b"]);
  assertEquals(await said("Ada", "a\u0000b\ud800c"), ["Ada", "a\ufffdb\ufffdc"]);
  assertEquals(await said("Ada", '"\\\u2028</script>\u0007'), ["Ada", '"\\\u2028</script>\u0007']);
  assertEquals(await said("a".repeat(40), "👩‍🚀".repeat(400)), ["a".repeat(40), "👩‍🚀".repeat(400)]);
  assertEquals(await said("Ada", `  ${"x".repeat(2000)}  `), ["Ada", "x".repeat(2000)]);
});

Deno.test("joining answers with what was missed, in order, then who is here", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  for (let i = 1; i <= 250; i++) ada.send({ username: "Ada", message: `${i}` });
  await ada.until(() => ada.messages().length === 250);

  await using grace = await Client.open(chat, { username: "Grace", since: 240 });
  const { users, online } = await grace.until(() => grace.events.find(({ event }) => event === "presence"));
  assertEquals([users.sort(), online], [["Ada", "Grace"], 2]);
  assertEvent(grace.events[0], { event: "joined", seq: 250, oldest: 1 });
  assertEquals(seqs(grace.events.slice(1, 11)), count(241, 250));
  await ada.say("new");
  await grace.until(() => grace.messages().at(-1)?.message === "new");
  assertEquals(seqs(grace.messages()), count(241, 251));

  await using lin = await Client.open(chat, { username: "Lin" });
  await lin.until(() => lin.messages().length === 200);
  assertEquals(seqs(lin.messages()), count(52, 251));
});

Deno.test("history pages back to the oldest message that is kept", async () => {
  await using chat = await start({ history: 300 });
  await using ada = await Client.open(chat, { username: "Ada" });
  for (let i = 1; i <= 700; i++) ada.send({ username: "Ada", message: `${i}` });
  await ada.until(() => ada.messages().length === 700);

  await using grace = await Client.open(chat, { username: "Grace", since: 0 });
  const { seq, oldest } = grace.events[0];
  assertEquals([seq, oldest], [700, 401]);
  await grace.until(() => grace.messages().length === 300);
  assertEquals(seqs(grace.messages()), count(401, 700));

  const seen: number[] = [];
  for (let before = 701; before > oldest; before = seen[0]) {
    const page = await grace.ask({ event: "history", before }, ({ event }) => event === "history");
    assertEquals(page.before, before);
    assert(page.messages.length > 0 && page.messages.length <= 200);
    seen.unshift(...seqs(page.messages));
  }
  assertEquals(seen, count(401, 700));
  const nothing = await grace.ask({ event: "history", before: oldest }, ({ event }) => event === "history");
  assertEquals(nothing.messages, []);
});

Deno.test("long messages are paged so that a reader can take them", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  const long = "\u0001".repeat(2000); // six characters each on the wire
  for (let i = 1; i <= 200; i++) ada.send({ username: "Ada", message: long });
  await ada.until(() => ada.messages().length === 200);
  await using grace = await Client.open(chat, { username: "Grace" });
  await grace.until(() => grace.messages().length === 200);
  assertEquals(seqs(grace.messages()), count(1, 200));
  const { messages } = await grace.ask({ event: "history", before: 201 }, ({ event }) => event === "history");
  assert(messages.length > 0 && JSON.stringify(messages).length < 1 << 20);
  assertEquals(messages.at(-1)?.seq, 200);
  assertEquals(grace.closed, undefined);
});

Deno.test("everyone who joined is told who comes, goes and types", async () => {
  await using chat = await start();
  await using ada = await Client.open(chat, { username: "Ada" });
  const roster = await ada.until(() => ada.events.find(({ event }) => event === "presence"));
  assertEvent(roster, { event: "presence", online: 1, users: ["Ada"] });

  const news = () => ada.next(({ event }) => event === "presence");
  let change = news();
  const grace = await Client.open(chat, { username: "Grace" });
  assertEvent(await change, { event: "presence", online: 2, joined: ["Grace"], left: [] });
  change = news();
  const twin = await Client.open(chat, { username: "Grace" });
  assertEvent(await change, { event: "presence", online: 3, joined: [], left: [] });
  change = news();
  await twin[Symbol.asyncDispose]();
  assertEvent(await change, { event: "presence", online: 2, joined: [], left: [] });
  change = news();
  grace.send({ event: "join", username: "Lin" });
  assertEvent(await change, { event: "presence", online: 2, joined: ["Lin"], left: ["Grace"] });

  const typing = ada.next(({ event }) => event === "typing");
  grace.send({ event: "typing" });
  assertEvent(await typing, { event: "typing", username: "Lin" });
  assertEvent(await grace.ask({ event: "ping" }, ({ event }) => event === "pong"), { event: "pong" });
  assert(!grace.events.some(({ event }) => event === "typing"));
  change = news();
  await grace[Symbol.asyncDispose]();
  assertEvent(await change, { event: "presence", online: 1, joined: [], left: ["Lin"] });
});

Deno.test("someone who has no name yet may read", async () => {
  await using chat = await start();
  await using reader = await Client.open(chat, {});
  const roster = await reader.until(() => reader.events.find(({ event }) => event === "presence"));
  assertEvent(roster, { event: "presence", online: 1, users: [] });
});

Deno.test("a rush of arrivals is a few frames for each", async () => {
  await using chat = await start();
  const clients: Client[] = [];
  await Promise.all(
    count(1, 150).map(async (i) => {
      clients.push(await Client.open(chat, { username: `user ${i}` }));
    }),
  );
  for (const client of clients) {
    await client.until(() => client.events.findLast(({ event }) => event === "presence")?.online === 150);
    const known = new Set<string>();
    for (const { users = [], joined = [] } of client.events) {
      for (const name of [...users, ...joined]) known.add(name);
    }
    assertEquals(known.size, 150);
  }
  const frames = clients.reduce(
    (sum, { events }) => sum + events.filter((e) => e.event === "presence").length,
    0,
  );
  assert(frames < 150 * 40, `${frames} frames`);
  for (const client of clients) await client[Symbol.asyncDispose]();
});

// ──────────────────────────────────────────────────── The program ────────────────────────────────────────────────────

Deno.test("the program says where it is, logs each message, and ends when it is told to", async () => {
  await using program = await Program.start();
  await using ada = await Client.open(program, { username: "Ada" });
  ada.username = 'Eve"\nMessage received: 7 from "Ada';
  await ada.say("a secret");
  await program.says(/Message received: 1 from "Eve\\" Message received: 7 from \\"Ada", 8 characters\n/);
  assert(!program.output.includes("secret"));
  for (let i = 1; i <= 500; i++) ada.send({ username: "Ada", message: `${i}` });
  await ada.until(() => ada.messages().length === 501);
  const begun = performance.now();
  const ending = program.end("SIGTERM");
  assertEquals((await ada.ended()).code, 1001);
  const { code } = await ending;
  assertEquals(code, 0);
  assert(performance.now() - begun < 2000);
  const lines = program.output.split("\n").filter((line) => line.startsWith("Message received"));
  assert(lines.length < 400, `${lines.length} lines for 501 messages that came together`);
});

Deno.test("the program is silent if it is told to be", async () => {
  const addr = { port: freePort() };
  await using program = new Program({ CHAT_LOG: "off", PORT: `${addr.port}` });
  await until(() => fetch(`http://127.0.0.1:${addr.port}/healthz`).then((answer) => answer.text()).catch(() => ""));
  {
    await using ada = await Client.open({ addr });
    await ada.say("Hi");
  }
  assertEquals((await program.end("SIGINT")).code, 0);
  assertEquals(program.output, "");
});

for (
  const [env, reason] of [
    [{ PORT: "abc" }, /PORT must be a whole number from 0 to 65535, not "abc"/],
    [{ PORT: "65536" }, /PORT must be/],
    [{ CHAT_LOG: "loud" }, /CHAT_LOG must be on or off/],
    [{ CHAT_HISTORY: "0" }, /CHAT_HISTORY must be/],
    [{ CHAT_DB: "/nowhere/chat.db" }, /database/],
  ] as const
) {
  Deno.test(`the program does not start with ${JSON.stringify(env)}, and says why in one line`, async () => {
    await using program = new Program(env);
    const [line] = await program.says(/^.*\n/);
    assertMatch(line, reason);
    assertEquals((await program.ended()).code, 1);
    assertEquals(program.output, line);
  });
}

Deno.test("a port that is taken stops the start with one line", async () => {
  await using chat = await start();
  await using program = new Program({ PORT: `${chat.addr.port}` });
  await program.says(/^The chat cannot start: .*port.*taken.*\n$/);
  assertEquals((await program.ended()).code, 1);
});

Deno.test("startChat() that cannot start leaves nothing behind", async () => {
  await using chat = await start();
  for (
    const options of [{ port: chat.addr.port }, { db: "/nowhere/chat.db" }, { port: chat.addr.port, db: "/nowhere/x" }]
  ) {
    const error = await start(options).then(() => undefined, (error) => error);
    assert(error instanceof Error);
  }
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
  }

  async #talk(chat: Place, atOnce: number): Promise<void> {
    while (this.#talking) {
      const first = this.said.length + 1;
      const batch = count(first, first + atOnce - 1).map((i) => ({
        message: `${this.name} ${i}`,
        id: `${this.name}-${i}`,
      }));
      while (true) {
        const client = new Client(`ws://127.0.0.1:${chat.addr.port}/`);
        try {
          await client.until(() => client.closed || client.opened);
          for (const message of batch) client.send({ username: this.name, ...message });
          await client.until(() => client.closed || batch.every(({ id }) => client.events.some((e) => e.id === id)));
          if (!client.closed) break;
        } finally {
          await client[Symbol.asyncDispose]();
        }
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
  await reader.until(() => reader.messages().length === reader.events[0].seq - reader.events[0].oldest + 1);
  return reader.messages();
}

Deno.test("a server that is killed again and again loses nothing and doubles nothing", async () => {
  await using file = await temporary();
  const env = { CHAT_DB: file.db, PORT: `${freePort()}` };
  const addr = { port: Number(env.PORT) };
  let program = await Program.start(env);
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

Deno.test("a message that is sent again is not doubled: here, after a restart, or through another instance", async () => {
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
  const [a, b] = await Promise.all(
    [ada, lin].map((client) => client.ask(again, ({ id }) => id === "another")),
  );
  assertEquals(a, b);
  assertEquals(texts(await everything(other)), ["once", "next", "through both"]);
});

Deno.test("two instances on one database are one room", async () => {
  await using file = await temporary();
  await using one = await start(file);
  await using two = await start(file);
  await using ada = await Client.open(one, { username: "Ada" });
  await using grace = await Client.open(two, { username: "Grace" });
  for (const client of [ada, grace]) {
    await client.until(() => client.events.findLast(({ event }) => event === "presence")?.online === 2);
  }
  const talkers = [new Talker(one, "one"), new Talker(two, "two")];
  for (const client of [ada, grace]) await client.until(() => client.messages().length > 500);
  const said = await Promise.all(talkers.map((talker) => talker.stop()));
  for (const client of [ada, grace]) {
    await client.until(() => client.messages().length === said.flat().length);
    assertComplete(client.messages(), said);
  }
  assertEquals(ada.messages(), grace.messages());
});

Deno.test("two processes on one file are one room, and one that dies is not here any more", async () => {
  await using file = await temporary();
  const env = { CHAT_DB: file.db };
  await using one = await Program.start(env);
  await using two = await Program.start(env);
  await using ada = await Client.open(one, { username: "Ada" });
  const grace = await Client.open(two, { username: "Grace" });
  const talkers = [new Talker(one, "one"), new Talker(two, "two")];
  for (const client of [ada, grace]) await client.until(() => client.messages().length > 100);
  const said = await Promise.all(talkers.map((talker) => talker.stop()));
  for (const client of [ada, grace]) {
    await client.until(() => client.messages().length === said.flat().length);
    assertComplete(client.messages(), said);
  }
  await ada.until(() => ada.events.some(({ joined }) => joined?.includes("Grace")));
  await two.end("SIGTERM");
  await ada.until(() => ada.events.some(({ left }) => left?.includes("Grace")));
});

Deno.test("a page that moves to another instance keeps its place", async () => {
  await using file = await temporary();
  await using one = await start(file);
  await using two = await start(file);
  await using ada = await Client.open(one);
  await ada.say("1", "2", "3");
  await using moved = await Client.open(two, { username: "Ada", since: 3 });
  assertEvent(moved.events.at(-1), { event: "joined", seq: 3, oldest: 1 });
  assertEquals(moved.messages(), []);
});

Deno.test("who is too far behind on another instance has to join again, and is not left behind", async () => {
  await using file = await temporary();
  await using one = await start({ ...file, history: 5 });
  await using two = await start({ ...file, history: 5 });
  await using grace = await Client.open(one);
  await using ada = await Client.open(two);
  for (let i = 1; i <= 12; i++) await ada.say(`${i}`);
  assertEquals((await grace.ended()).code, 1013);
  assertEquals(seqs(await everything(one)), count(8, 12));
});

Deno.test("an instance that gave no sign of life is presumed dead", async () => {
  using kv = await Deno.openKv(":memory:");
  await kv.set(["here", "dead", 0], { online: 2, users: ["Ghost"], until: Date.now() + 2500 });
  await using chat = await start({ db: kv });
  await using ada = await Client.open(chat, { username: "Ada" });
  const { online, users } = await ada.until(() => ada.events.find(({ event }) => event === "presence"));
  assertEquals([online, users.sort()], [3, ["Ada", "Ghost"]]);
  const change = await ada.next(({ event }) => event === "presence");
  assertEvent(change, { event: "presence", online: 1, joined: [], left: ["Ghost"] });
});

Deno.test("joining at any point of a running stream misses nothing and repeats nothing", async () => {
  await using chat = await start();
  const talkers = ["Ada", "Grace"].map((name) => new Talker(chat, name, 20));
  await using watcher = await Client.open(chat, { since: 0 });
  const joined: Client[] = [];
  for (let i = 0; i < 60; i++) {
    await watcher.until(() => watcher.messages().length > i * 20);
    const since = Math.floor(i / 2) * 10;
    joined.push(await Client.open(chat, { username: `reader ${i}`, since }));
  }
  const said = await Promise.all(talkers.map((talker) => talker.stop()));
  const last = said.flat().length;
  for (const [i, reader] of joined.entries()) {
    await reader.until(() => reader.messages().at(-1)?.seq === last);
    assertEquals(seqs(reader.messages()), count(Math.floor(i / 2) * 10 + 1, last));
    await reader[Symbol.asyncDispose]();
  }
});

type Commit = Deno.AtomicOperation["commit"];

/** A database that does what it is told before each commit. */
function unreliable(kv: Deno.Kv, commit: (commit: Commit) => ReturnType<Commit>): Deno.Kv {
  const get = (target: Deno.Kv, name: string) => {
    const value = Reflect.get(target, name);
    if (name !== "atomic") return value.bind(target);
    return () => {
      const operation = target.atomic(), { commit: original } = operation;
      operation.commit = () => commit(() => original.call(operation));
      return operation;
    };
  };
  return new Proxy(kv, { get: get as ProxyHandler<Deno.Kv>["get"] });
}

Deno.test("a database that fails for a while loses nothing", async () => {
  using kv = await Deno.openKv(":memory:");
  let commits = 0;
  const failing = unreliable(kv, (commit) => {
    if (++commits <= 3) throw new Error("database is locked");
    return commit();
  });
  await using chat = await start({ db: failing });
  await using ada = await Client.open(chat);
  for (let i = 1; i <= 100; i++) ada.send({ username: "Ada", message: `${i}` });
  await ada.until(() => ada.messages().length === 100);
  assertEquals(texts(ada.messages()), count(1, 100).map(String));
  assert(commits > 3);
});

Deno.test("a write that was done but reported as failed is not done again", async () => {
  using kv = await Deno.openKv(":memory:");
  let commits = 0;
  const lying = unreliable(kv, async (commit) => {
    const result = await commit();
    if (++commits <= 2) throw new Error("connection lost");
    return result;
  });
  await using chat = await start({ db: lying });
  await using ada = await Client.open(chat);
  for (let i = 1; i <= 100; i++) ada.send({ username: "Ada", message: `${i}` });
  await ada.until(() => ada.messages().at(-1)?.message === "100");
  assertEquals(texts(ada.messages()), count(1, 100).map(String));
});

Deno.test("what waits for a database that fails is bounded, and its sender keeps it", async () => {
  using kv = await Deno.openKv(":memory:");
  const works = Promise.withResolvers<void>();
  await using chat = await start({ db: unreliable(kv, async (commit) => (await works.promise, commit())) });
  await using ada = await Client.open(chat);
  const message = "x".repeat(2000);
  for (let i = 0; i < 9000; i++) ada.send({ username: "Ada", message, id: `${i}` });
  const refused = () => ada.events.filter(({ event }) => event === "error");
  await ada.until(() => refused().length > 0);
  works.resolve();
  await ada.until(() => ada.messages().length + refused().length === 9000);
  const { id, error, retry_after } = refused()[0];
  assertMatch(error, /try again/);
  assertEquals(retry_after, 1000);
  const again = await ada.ask({ username: "Ada", message, id }, (event) => event.id === id);
  assertEquals(again.message, message);
});

Deno.test("a shutdown does not wait for a database that hangs, nor for a peer that does not read", async () => {
  using kv = await Deno.openKv(":memory:");
  const chat = await start({ db: unreliable(kv, () => new Promise(() => {})) });
  using lazy = await Raw.open(chat.addr.port);
  await lazy.frame('{"event":"join","username":"Lazy"}');
  const ada = await Client.open(chat, { username: "Ada" });
  ada.send({ username: "Ada", message: "never written" });
  await ada.until(() => ada.events.some(({ users, joined }) => (users ?? joined)?.includes("Ada")));
  const begun = performance.now();
  await chat.shutdown();
  assert(performance.now() - begun < 2000);
  assertEquals((await ada.ended()).code, 1001);
});

Deno.test("a client that does not read is cut off, and finds everything when it joins again", async () => {
  await using chat = await start();
  const lazy = await Raw.open(chat.addr.port);
  await lazy.frame('{"event":"join","username":"Lazy","since":0}');
  await using ada = await Client.open(chat, { username: "Ada" });
  await ada.until(() => ada.events.some(({ users }) => users?.includes("Lazy")));
  const message = "x".repeat(2000);
  let sent = 0;
  const gone = () => ada.events.some(({ left }) => left?.includes("Lazy"));
  while (!gone()) {
    for (let i = 0; i < 500; i++) ada.send({ username: "Ada", message: `${++sent} ${message.slice(10)}` });
    await ada.until(() => ada.messages().length === sent);
    assert(sent < 20_000, "it was never cut off");
  }
  const { events, code } = await lazy.drain();
  assertEquals(code, 1013);
  const seen = events.filter(({ event }) => event === "receive_message");
  assertEquals(seqs(seen), count(1, seen.length));
  await using back = await Client.open(chat, { username: "Lazy", since: seen.length });
  await back.until(() => back.messages().at(-1)?.seq === sent);
  assertEquals(seqs(back.messages()), count(seen.length + 1, sent));
});

// ───────────────────────────────────────────── On the open internet ─────────────────────────────────────────────

Deno.test("a handshake from another site is refused before the upgrade", async () => {
  await using chat = await start({ allowedOrigins: ["https://chat.example"] });
  const status = async (...headers: string[]) => {
    using raw = await Raw.connect(chat.addr.port, ...HANDSHAKE, ...headers);
    return (await raw.head()).split(" ")[1];
  };
  assertEquals(await status(), "101");
  assertEquals(await status("Origin: http://chat.test"), "101");
  assertEquals(await status("Origin: https://chat.test"), "101");
  assertEquals(await status("Origin: https://chat.example"), "101");
  assertEquals(await status("Origin: http://chat.example"), "403");
  assertEquals(await status("Origin: http://chat.test:81"), "403");
  assertEquals(await status("Origin: http://chat.test.evil.example"), "403");
  assertEquals(await status("Origin: null"), "403");
  assertEquals(await status("Origin: "), "403");
});

Deno.test("the page may run its own script and style and nothing else", async () => {
  await using chat = await start();
  const response = await fetch(`http://127.0.0.1:${chat.addr.port}/`);
  const html = await response.text();
  const policy = response.headers.get("content-security-policy")!;
  for (const tag of ["script", "style"]) {
    const [, content] = html.match(new RegExp(`<${tag}[^>]*>([^]*?)</${tag}>`))!;
    const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(content));
    assert(policy.includes(`${tag}-src 'sha256-${new Uint8Array(digest).toBase64()}'`), tag);
  }
  const strict = [
    "default-src 'none'",
    "connect-src 'self'",
    "frame-ancestors 'none'",
    "base-uri 'none'",
    "form-action 'none'",
  ];
  for (const directive of strict) assert(policy.includes(directive), directive);
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

Deno.test("who does not know the password sees nothing and can say nothing", async () => {
  await using chat = await start({ password: "pässword" });
  await using ada = await Client.open(chat, { username: "Ada", password: "pässword" });
  await using stranger = await Client.open(chat);
  for (const event of [{ username: "Eve", message: "Hi" }, { event: "history", before: 9 }, { event: "ping" }]) {
    assertMatch((await stranger.ask(event, () => true)).error, /password/);
  }
  await ada.say("a secret");
  stranger.send({ event: "join", username: "Eve", password: "passwort" });
  stranger.send({ event: "join", username: "Eve", password: "pässword" });
  stranger.send({ username: "Eve", message: "let me in" });
  const begun = performance.now();
  assertEquals((await stranger.ended()).code, 1008);
  assert(performance.now() - begun > 500, "a wrong password is answered after a pause");
  assertEquals(stranger.events.filter(({ event }) => event !== "error"), []);
  assertEquals(texts(ada.messages()), ["a secret"]);
  assert(!ada.events.some(({ joined }) => joined?.includes("Eve")));
});

Deno.test("an address that guesses passwords has to wait, and nobody else", async () => {
  await using chat = await start({ password: "secret", trustProxy: true });
  const guess = async (password: string, address: string) => {
    const raw = await Raw.open(chat.addr.port, `X-Forwarded-For: 203.0.113.9, ${address}`);
    await raw.frame({ event: "join", username: "Eve", password });
    return raw;
  };
  const guesses = await Promise.all(count(1, 12).map((i) => guess(`guess ${i}`, "192.0.2.1")));
  const innocent = await guess("secret", "192.0.2.1");
  const elsewhere = await guess("secret", "192.0.2.2");
  const codes = (await Promise.all(guesses.map((raw) => raw.drain()))).map(({ code }) => code);
  assert(codes.includes(1008));
  assert(codes.filter((code) => code === 1013).length >= 5, codes.join());
  assertEquals((await innocent.drain()).code, 1013);
  await using ada = await Client.open(chat, { username: "Ada", password: "secret" });
  const { users } = await ada.until(() => ada.events.find(({ event }) => event === "presence"));
  assertEquals(users.sort(), ["Ada", "Eve"]);
  elsewhere[Symbol.dispose]();
});

Deno.test("who does not join a room with a password within ten seconds is closed", async () => {
  await using chat = await start({ password: "secret" });
  await using idle = await Client.open(chat);
  assertEquals((await idle.ended()).code, 1008);
});

Deno.test("a flood is held back, and an honest sender loses nothing", async () => {
  await using chat = await start({ rateLimit: 5 });
  await using ada = await Client.open(chat, { username: "Ada" });
  await using grace = await Client.open(chat, { username: "Grace" });
  for (let i = 1; i <= 40; i++) ada.send({ username: "Ada", message: `${i}`, id: `${i}` });
  const refused = () => ada.events.filter(({ event }) => event === "error");
  await ada.until(() => refused().length + ada.messages().length === 40);
  assert(ada.messages().length >= 25 && ada.messages().length <= 30, `${ada.messages().length} came through`);
  for (const { id, error, retry_after } of refused()) {
    assertMatch(error, /too many .* try again in [\d.]+ s/);
    assert(retry_after > 0 && retry_after <= 1000 && Number(id) > 25);
  }
  assertEquals((await grace.say("I am not concerned")).event, "receive_message");
  const { id, retry_after } = refused()[0];
  await new Promise((resolve) => setTimeout(resolve, retry_after));
  await ada.ask({ username: "Ada", message: "again", id }, (event) => event.id === id && event.seq);
});

Deno.test("pings, joins, typing and history are limited too", async () => {
  await using chat = await start({ rateLimit: 20 });
  for (const event of ["ping", "join", "typing", "history"]) {
    await using eve = await Client.open(chat, { username: "Eve" });
    for (let i = 0; i < 40; i++) eve.send({ event, before: 1 });
    const { error, retry_after } = await eve.until(() => eve.events.find(({ event }) => event === "error"));
    assertMatch(error, new RegExp(`too many of ${event}: try again`));
    assert(retry_after > 0 && retry_after <= 1000);
  }
});

Deno.test("a client that ignores the errors is closed", async () => {
  await using chat = await start({ rateLimit: 20 });
  await using eve = await Client.open(chat);
  for (let errors = 0; !eve.closed; errors++) {
    assert(errors < 1000, "it was never closed");
    eve.send("nonsense");
    await eve.until(() => eve.closed || eve.events.length > errors);
  }
  assertEquals(eve.closed.code, 1013);
});

Deno.test("a room that is full answers 503, and lets the next in when someone leaves", async () => {
  await using chat = await start({ maxClients: 3, maxClientsPerAddress: 2, trustProxy: true });
  const come = (address: string) => Raw.connect(chat.addr.port, ...HANDSHAKE, `X-Forwarded-For: ${address}`);
  using first = await come("192.0.2.1");
  assertMatch(await first.head(), /^HTTP\/1.1 101 /);
  using second = await come("192.0.2.1");
  assertMatch(await second.head(), /^HTTP\/1.1 101 /);
  using third = await come("192.0.2.1");
  assertMatch(await third.head(), /^HTTP\/1.1 503 [^]*\r\nretry-after: \d+\r\n/i);
  using other = await come("192.0.2.2");
  assertMatch(await other.head(), /^HTTP\/1.1 101 /);
  using late = await come("192.0.2.3");
  assertMatch(await late.head(), /^HTTP\/1.1 503 /);
  first[Symbol.dispose]();
  await until(async () => {
    using again = await come("192.0.2.3");
    return /^HTTP\/1.1 101 /.test(await again.head());
  });
});

Deno.test("a host that is none is a bad request", async () => {
  await using chat = await start();
  for (const host of ["a b", "[", "x:99999", "a%"]) {
    for (
      const lines of [["GET / HTTP/1.1", `Host: ${host}`], [...HANDSHAKE.with(1, `Host: ${host}`), "Origin: http://x"]]
    ) {
      using raw = await Raw.connect(chat.addr.port, ...lines);
      assertMatch(await raw.head(), /^HTTP\/1.1 400 /);
    }
  }
});

Deno.test("a frame over 64 KiB closes its connection with 1009", async () => {
  await using chat = await start();
  for (const frame of ["x".repeat(65_537), "€".repeat(22_000), new Uint8Array(65_537)]) {
    await using eve = await Client.open(chat);
    eve.send(frame);
    assertEquals((await eve.ended()).code, 1009);
    assertEquals(eve.events, []);
  }
  await using ada = await Client.open(chat);
  assertMatch((await ada.ask(" ".repeat(65_536), () => true)).error, /JSON/);
});

Deno.test("a peer that does not answer pings is closed, and one that does stays", async () => {
  await using chat = await start({ idleTimeout: 1 });
  await using ada = await Client.open(chat, { username: "Ada" });
  using dead = await Raw.open(chat.addr.port);
  await dead.frame('{"event":"join","username":"Dead"}');
  await ada.until(() => ada.events.some(({ online }) => online === 2));
  await ada.until(() => ada.events.some(({ left }) => left?.includes("Dead")));
  assertEquals(ada.closed, undefined);
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

Deno.test("broken bytes end at most their own connection", async () => {
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

Deno.test("ten thousand random frames disturb nobody", async () => {
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

Deno.test("with a certificate it serves HTTPS and WSS", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const [tlsCert, tlsKey] = [`${folder}/cert.pem`, `${folder}/key.pem`];
    await Deno.writeTextFile(tlsCert, CERTIFICATE);
    await Deno.writeTextFile(tlsKey, KEY);
    await using chat = await start({ tlsCert, tlsKey });
    using client = Deno.createHttpClient({ caCerts: [CERTIFICATE] });
    const page = await fetch(`https://localhost:${chat.addr.port}/healthz`, { client });
    assertEquals(await page.text(), "ok\n");
    await using socket = new Client(`wss://localhost:${chat.addr.port}/`, { client });
    await socket.until(() => socket.opened);
    assertEvent(await socket.ask({ event: "ping" }), { event: "pong" });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("the program needs no disk, and says when everyone can come in", async () => {
  await using file = await temporary(); // so that Deno's own storage is not the developer's
  await using program = new Program({ HOST: "0.0.0.0", CHAT_DB: "", DENO_DIR: file.folder }, FLAGS);
  program.addr.port = Number((await program.says(/open: http:\/\/localhost:(\d+)\/ .*127\.0\.0\.1/))[1]);
  await program.says(/CHAT_PASSWORD/);
  await using ada = await Client.open(program, { username: "Ada" });
  assertEquals((await ada.say("kept")).seq, 1);
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
  "disable-sync no-first-run disable-background-timer-throttling disable-renderer-backgrounding " +
  "disable-backgrounding-occluded-windows disable-dev-shm-usage lang=en-GB window-size=1100,800";

/** The browsers: whether they are there, how they are started, and what is asked of them for a session. */
const BROWSERS = {
  Chromium: {
    missing: await isMissing("chromedriver", "--version") || await isMissing("chromium", "--version"),
    async drive() {
      const [driver, port] = await launch("chromedriver", ["--port=0"], /on port (\d+)\.\s/);
      return { port, processes: [driver] };
    },
    capabilities: {
      "goog:chromeOptions": { args: SWITCHES.split(" ").map((arg) => `--${arg}`) },
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
        env: { DISPLAY: `:${number}`, WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS: "1" }, // which root would need
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

  static async open(kind: keyof typeof BROWSERS): Promise<Browser> {
    const browser = new Browser(), { drive, capabilities } = BROWSERS[kind];
    const { port, processes } = await drive();
    browser.#processes = processes;
    browser.#session = `http://127.0.0.1:${port}/session`;
    const session = await browser.#ask("POST", "", { capabilities: { alwaysMatch: capabilities } });
    browser.#session += `/${(session as { sessionId: string }).sessionId}`;
    await browser.resize(1100, 840);
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

  /** Sets the size of the view, and the theme: only in Chromium. */
  async look(width: number, height: number, theme = "light"): Promise<void> {
    const metrics = { width, height, deviceScaleFactor: 1, mobile: false };
    await this.cdp("Emulation.setDeviceMetricsOverride", metrics);
    await this.cdp("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: theme }] });
  }

  /** Sets the size of the window, in any browser. */
  async resize(width: number, height: number): Promise<void> {
    await this.#ask("POST", "/window/rect", { width, height });
  }

  async newTab(): Promise<string> {
    const { handle } = await this.#ask("POST", "/window/new", { type: "window" }) as { handle: string };
    await this.switchTo(handle);
    await this.resize(1100, 840);
    return handle;
  }

  async switchTo(handle: string): Promise<void> {
    await this.#ask("POST", "/window", { handle });
  }

  async tab(): Promise<string> {
    return await this.#ask("GET", "/window") as string;
  }

  /** Closes all tabs but this one, which it empties. */
  async clear(first: string): Promise<void> {
    for (const tab of await this.#ask("GET", "/window/handles") as string[]) {
      await this.switchTo(tab);
      if (tab !== first) await this.#ask("DELETE", "/window");
    }
    await this.switchTo(first);
    await this.goTo("about:blank");
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
  /** Where it runs, at the same time. Default: Chromium. */
  browsers?: (keyof typeof BROWSERS)[];
}

const BOTH: PageTest = { browsers: ["Chromium", "WebKit"] };

/** A test in the browser. It fails with any error of the page's script and any violation of its policy. */
function pageTest(
  name: string,
  body: (page: Page) => Promise<void>,
  { browsers = ["Chromium"], ...options }: PageTest = {},
): void {
  const sanitizers = { sanitizeOps: false, sanitizeResources: false }; // the browsers outlive the test
  const there = browsers.filter((kind) => !BROWSERS[kind].missing);
  const steps = browsers.map((kind) => ({
    name: `in ${kind}`,
    ignore: !there.includes(kind),
    fn: () => inBrowser(kind, body, options),
    sanitizeExit: false,
    ...sanitizers,
  }));
  const fn = async (test: Deno.TestContext) => {
    if (steps.length === 1) await steps[0].fn();
    else await Promise.all(steps.map((step) => test.step(step)));
  };
  Deno.test({ name: `page: ${name}`, ignore: there.length === 0, fn, ...sanitizers });
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
      await browser.until(({ status, words }) => status === "Connected" && words.includes("(you)"));
    },
    say: (text) => browser.type("Message", text + ENTER),
    async guest(username) {
      guests.push(await Client.open(chat, { username }));
      return guests.at(-1)!;
    },
  };
  if (kind === "Chromium") await browser.look(1100, 800);
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

Deno.test("page: comes in one request of at most 14,336 bytes", async () => {
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
    "http:// https://% https://a.example\u202egnp.exe",
  );
  await enter("Grace");
  await until(({ texts }) => texts.length === 3);
  const links = await run(({ log }) =>
    [...log.querySelectorAll("a")].map((a) => [a.textContent, a.target, a.rel, a.protocol.replace("s:", ":")])
  );
  const shown = ["https://a.example/x_(y)", "http://b.example/?q=1", "HTTPS://C.example", "https://a.example"];
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
  await run(({ log }) => log.scrollTop -= 300);
  await until(({ button }) => button("Newest"));
  await type("Message", ESCAPE);
  await until(({ isAtEnd }) => isAtEnd);
}, BOTH);

pageTest("loads older messages and keeps the place", async ({ run, guest, enter, until }) => {
  const ada = await guest("Ada");
  await ada.say(...numbered(700));
  await enter("Grace");
  await until(({ texts, isAtEnd }) => texts.at(-1) === "message 700" && isAtEnd);
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
  await until((page) => (page.log.scrollTop = 1e9, page.texts.at(-1) === "message 700" && page.isAtEnd));
  const shown = await run(({ texts }) => texts);
  assertEquals(shown, numbered(700).slice(-shown.length));
}, BOTH);

pageTest("misses no long message on the way down", async ({ run, guest, enter, until }) => {
  // Six characters each on the wire: then a page of the history has fewer messages than others.
  const ada = await guest("Ada");
  await ada.say(...numbered(520).map((text) => text + "\u0001".repeat(1900)));
  await enter("Grace");
  await until(({ texts, isAtEnd }) => texts.length > 10 && isAtEnd);
  await until((page) => (page.log.scrollTop = 0, page.texts[0]?.startsWith("message 1\u0001")));
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
    ])
  );
  await browser.reload();
  await until(({ words, texts }) => /More than 2000/.test(words) && texts.includes("behind it"));
  const old = ({ one }: InPage) => Object.assign(one(".refused"), { old: true }) && true;
  await run(old);
  await click("Try again");
  await until(({ one, words }) => one(".refused") && !("old" in one(".refused")) && /More than 2000/.test(words));
  await click("Edit");
  await until((page) => page.isSettled && page.field("Message").value.length === 2001);
  assertEquals(await run(() => JSON.parse(sessionStorage["chat.outbox"])), []);
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

pageTest("asks for the password of the room", async ({ browser, url, type, until, say }) => {
  await browser.goTo(url);
  await until((page) => document.activeElement === page.field("Password"));
  await type("Password", `wrong${ENTER}`);
  await until(({ words }) => /not the password/.test(words));
  await type("Password", `secret${ENTER}`);
  await until((page) => page.status === "Connected" && !page.isShown(page.field("Password")));
  await browser.reload();
  await until(({ status }) => status === "Connected");
  await type("Your name", `Ada${ENTER}`);
  await say("I am in");
  await until(({ isSettled, texts }) => isSettled && texts[0] === "I am in");
}, { password: "secret", ...BOTH });

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
    await until(({ isSettled, log }) => !isSettled && /Sending/.test(log.innerText));
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
  });
  await until(({ kept, status }) => {
    dispatchEvent(new Event("online"));
    return status !== "Connected" && (WebSocket.prototype.send = kept.send);
  });
  await until(({ status }) => status === "Connected");
});

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
  const icon = await run(() => document.querySelector<HTMLLinkElement>("link[rel=icon]")!.href);
  const hide = (hidden: boolean) =>
    run((_, hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }, hidden);
  const isPlain = (_: InPage, icon: string) =>
    document.title === "Chat" && document.querySelector<HTMLLinkElement>("link[rel=icon]")!.href === icon;
  await hide(true);
  await ada.say("one", "two");
  await until(() => document.title.startsWith("(2)"));
  assert(!await run(isPlain, icon));
  await hide(false);
  await until(isPlain, icon);
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
  const { browser, run, click, type, guest, enter, say, until, url } = page;
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
  await until(({ one, button }) => /ada is here already/.test(one("#wrong").innerText) && button("ada"));
  assert(await run(isRight));
  await browser.reload();
  await until(({ texts }) => texts.length === 3);
  await until(isRight);
  await browser.newTab();
  await browser.goTo(url);
  await until(({ texts }) => texts.length === 3);
  await until(isRight);
});

pageTest("tells the room the last of many names", async ({ browser, run, click, press, enter, guest, until }) => {
  const ada = await guest("Ada");
  await enter("Name 0");
  for (const i of count(1, 14)) {
    await click("Name");
    await run((page, i) => page.field("Your name").value = `Name ${i}`, i);
    await press(ENTER);
  }
  await until(({ people, words }) => people.join() === "Name 14,Ada" && /Name 14 \(you\)/.test(words));
  ada.send({ event: "join", username: "Grace" });
  await until(({ words }) => /Ada is now Grace/.test(words));
  await browser.goTo("about:blank");
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
    await press(SHIFT + ENTER, "b");
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
    await browser.resize(1100, 840);
  },
  BOTH,
);

pageTest(
  "completes names, and answers with a quote",
  async ({ browser, run, guest, enter, type, press, click, until }) => {
    const ada = await guest("Ada Lovelace");
    await guest("Alan");
    await ada.say("**Bold** _and_ snake_case", "second");
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
  async ({ browser, run, url, type, until }) => {
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
  },
  { password: "secret" },
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
    ) => [log.scrollHeight <= log.clientHeight, isShown(one("header"))]);
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
      const row = one(".first"), name = one(".first .name"), bubble = one(".first .bubble");
      let least = 99;
      for (let hue = 0; hue < 360; hue += 5) {
        row.style.setProperty("--hue", `${hue}`);
        const letter = getComputedStyle(bubble, "::before");
        const onBubble = ratio(getComputedStyle(name).color, getComputedStyle(bubble).backgroundColor);
        least = Math.min(least, onBubble, ratio(letter.color, letter.backgroundColor));
      }
      return least;
    });
    assert(contrast >= 4.5, `${contrast} in the ${theme} theme`);
  }
});

/** How many seconds the soak lasts, where there is to be one. */
const SOAK = Number(Deno.env.get("SOAK") ?? 0);

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

// ─────────────────────────────────────────────────── Benchmarks ───────────────────────────────────────────────────

/** The chat as it is usually written: each message is sent to each socket, one at a time, and kept nowhere. */
function plainLoop(): Deno.HttpServer<Deno.NetAddr> {
  const sockets = new Set<WebSocket>();
  return Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, (request) => {
    const { socket, response } = Deno.upgradeWebSocket(request);
    socket.onopen = () => sockets.add(socket);
    socket.onclose = () => sockets.delete(socket);
    socket.onmessage = ({ data }) => {
      const { event, username, message } = JSON.parse(data);
      if (event === "join") return socket.send('{"event":"joined"}');
      const text = JSON.stringify({ event: "receive_message", time: Date.now(), username, message });
      for (const one of sockets) if (one.readyState === WebSocket.OPEN) one.send(text);
    };
    return response;
  });
}

/** Sockets that only count the lines they receive, so that they cost as little as they can. */
class Crowd {
  readonly #sockets: WebSocket[] = [];
  #missing = 0;
  #complete = () => {};

  static async join({ addr: { port } }: Place, size: number): Promise<Crowd> {
    const crowd = new Crowd();
    await Promise.all(
      count(1, size).map((i) => {
        const socket = new WebSocket(`ws://127.0.0.1:${port}/`);
        crowd.#sockets.push(socket);
        return new Promise<void>((resolve) => {
          socket.onopen = () => socket.send(JSON.stringify({ event: "join", username: `user ${i}` }));
          socket.onmessage = ({ data }) => {
            if (!data.includes('"joined"')) return;
            socket.onmessage = ({ data }) => crowd.#hear(data);
            resolve();
          };
        });
      }),
    );
    return crowd;
  }

  #hear(frame: string): void {
    if (!frame.includes('"receive_message"') && !frame.includes('"error"')) return;
    for (let at = 0; at >= 0; at = frame.indexOf("\n", at + 1)) this.#missing--;
    if (this.#missing <= 0) this.#complete();
  }

  /** Each of the first `senders` sends so many frames; resolves when each of them was answered `answers` times. */
  async exchange(senders: number, frames: string[], answers: number): Promise<void> {
    this.#missing = senders * frames.length * answers;
    const complete = new Promise<void>((resolve) => this.#complete = resolve);
    for (const socket of this.#sockets.slice(0, senders)) for (const frame of frames) socket.send(frame);
    await complete;
  }
}

const hello = count(1, 10).map((i) => `{"event":"send_message","username":"user","message":"Hello number ${i}"}`);

/** Starts what a benchmark needs when it is run for the first time. */
function once<T>(make: () => Promise<T>): () => Promise<T> {
  let made: Promise<T> | undefined;
  return () => made ??= make();
}

for (const size of [10, 100]) {
  const group = `500 messages to each of ${size} clients`;
  const senders = Math.min(size, 50), frames = count(1, 500 / senders).map((i) => hello[i % 10]);
  const bench = (name: string, baseline: boolean, server: () => Promise<Place>) => {
    const crowd = once(async () => await Crowd.join(await server(), size));
    Deno.bench({ name, group, baseline }, async (b) => {
      const joined = await crowd();
      b.start();
      await joined.exchange(senders, frames, size);
      b.end();
    });
  };
  bench("the plain loop", true, () => Promise.resolve(plainLoop()));
  bench("this chat, in memory", false, () => start());
  bench("this chat, on disk", false, async () => await start({ db: `${await Deno.makeTempDir()}/bench.db` }));
}

const full = once(async () => {
  const chat = await start();
  await (await Crowd.join(chat, 1)).exchange(1, count(1, 500).map(() => hello[0]), 1);
  return chat;
});

Deno.bench("join, 200 messages behind", { group: "one client" }, async (b) => {
  const chat = await full();
  b.start();
  const client = await Client.open(chat, { username: "Ada", since: 300 });
  await client.until(() => client.messages().length >= 200);
  b.end();
  await client[Symbol.asyncDispose]();
});

const refusing = once(async () => await Crowd.join(await full(), 1));

Deno.bench("refuse 100 frames", { group: "one client" }, async (b) => {
  const client = await refusing();
  b.start();
  await client.exchange(1, count(1, 100).map(() => '{"username":"Ada","message":"","id":"x"}'), 1);
  b.end();
});

// ───────────────────────────────────────────────────── Soak ─────────────────────────────────────────────────────

/** Connections come, go, flood and stall; the memory of the server has to stay where it was. */
async function soak(seconds: number): Promise<void> {
  await using program = await Program.start({ CHAT_HISTORY: "1000", CHAT_RATE_LIMIT: "20" });
  const memory = async () => {
    const { stdout } = await new Deno.Command("ps", { args: ["-o", "rss=", "-p", `${program.pid}`] }).output();
    return Number(new TextDecoder().decode(stdout)) / 1024;
  };
  const end = Date.now() + seconds * 1000;
  const until = <T>(work: () => Promise<T>) =>
    (async () => {
      while (Date.now() < end) await work().catch(() => {});
    })();
  const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
  const text = "x".repeat(500);
  const work = [
    ...count(1, 10).map((i) =>
      until(async () => { // comes, says something, goes
        await using client = await Client.open(program, { username: `guest ${i}` });
        await client.say(text);
      })
    ),
    ...count(1, 5).map((i) =>
      until(async () => { // floods until it is closed
        await using client = await Client.open(program, { username: `flood ${i}` });
        while (!client.closed) {
          for (let k = 0; k < 50; k++) client.send({ username: `flood ${i}`, message: text });
          await pause(10);
        }
      })
    ),
    ...count(1, 20).map((i) =>
      until(async () => { // never reads
        using raw = await Raw.open(program.addr.port);
        await raw.frame(`{"event":"join","username":"stalled ${i}","since":0}`);
        await pause(3000 + 200 * i);
      })
    ),
    ...count(1, 5).map(() =>
      until(async () => { // breaks off in the middle
        using raw = await Raw.connect(program.addr.port, ...HANDSHAKE);
        await raw.frame("[", { length: 60_000 });
        await pause(50);
      })
    ),
  ];
  await pause(10_000);
  const first = await memory();
  console.log(`after 10 s: ${first.toFixed(0)} MB`);
  await Promise.all(work);
  const last = await memory();
  console.log(`after ${seconds} s: ${last.toFixed(0)} MB`);
  await using ada = await Client.open(program, { username: "Ada" });
  await ada.say("still here");
  assert(last < 1.3 * first + 20, `memory grew from ${first} to ${last} MB`);
}

if (Deno.args[0] === "soak") await soak(Number(Deno.args[1] ?? 60));
