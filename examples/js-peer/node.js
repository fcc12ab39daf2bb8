// js-libp2p as paragraph "Transport" of mesh.proto wants it, and as strangers cannot harm it.
import { generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { createLibp2p } from 'libp2p'

/** Streams of one protocol on a connection. By default a member may open 32. */
export const MANY = { maxInboundStreams: 2048, maxOutboundStreams: 2048 }

export async function createNode (seed, listen, gate) {
  return await createLibp2p({
    privateKey: await generateKeyPairFromSeed('Ed25519', seed),
    addresses: { listen },
    transports: [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux(MANY)],
    connectionGater: { denyInboundEncryptedConnection: (peer) => peer.type !== 'Ed25519' },
    // By default strangers who say nothing keep members out: five connections a second, ten unfinished ones.
    connectionManager: { inboundConnectionThreshold: 500, maxIncomingPendingConnections: 500, reconnectRetries: 0 },
    connectionMonitor: { enabled: false },
    services: {
      identify: identify(),
      ping: ping(),
      pubsub: (components) => gossipsub({
        allowPublishToZeroTopicPeers: true,
        maxInboundDataLength: 256 * 1024,
        scoreParams: { IPColocationFactorWeight: 0 } // members may share a router
      })(closed(components, gate))
    }
  })
}

/** What a service of libp2p gets, with a registrar that knows members only. */
function closed (components, gate) {
  const registrar = gate.registrar(components.registrar)
  return new Proxy(components, { get: (target, name) => name === 'registrar' ? registrar : target[name] })
}
